"""Kubernetes quantities ("250m", "1536Mi", "156340384n") as plain numbers in base units, and back."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}


def parse_quantity(text: str | int | float | None) -> float:
    """The value of a quantity in base units (cores, bytes, count); a missing one is 0.

    Raises ValueError naming the text when it is not a quantity.
    """
    if text is None:
        return 0.0
    if isinstance(text, (int, float)):
        return float(text)
    number, suffix = text, ""
    for length in (2, 1):
        if text[-length:] in _SUFFIXES and text[-length:]:
            number, suffix = text[:-length], text[-length:]
            break
    try:
        return float(Decimal(number) * _SUFFIXES[suffix])
    except InvalidOperation as error:
        raise ValueError(f"{text!r} is not a Kubernetes quantity") from error


def cpu_nanocores(cores: float) -> str:
    """Cores as metrics-server writes them ("156340384n")."""
    return f"{round(cores * 1e9)}n"


def memory_kibibytes(memory_bytes: float) -> str:
    """Bytes as metrics-server and the kubelet write them ("173920Ki")."""
    return f"{round(memory_bytes / 1024)}Ki"


def pod_requests(pod_spec: dict) -> tuple[float, float]:
    """What the scheduler reserves for a pod: (cpu cores, memory bytes).

    Containers are summed; init containers count by their maximum, sidecars (restartPolicy Always) like containers,
    as the scheduler's PodRequests does; overhead is added.
    """
    cpu = memory = 0.0
    for container in pod_spec.get("containers") or ():
        requests = (container.get("resources") or {}).get("requests") or {}
        cpu += parse_quantity(requests.get("cpu"))
        memory += parse_quantity(requests.get("memory"))
    initial_cpu = initial_memory = 0.0
    for container in pod_spec.get("initContainers") or ():
        requests = (container.get("resources") or {}).get("requests") or {}
        one_cpu, one_memory = parse_quantity(requests.get("cpu")), parse_quantity(requests.get("memory"))
        if container.get("restartPolicy") == "Always":
            cpu, memory = cpu + one_cpu, memory + one_memory
        else:
            initial_cpu, initial_memory = max(initial_cpu, one_cpu), max(initial_memory, one_memory)
    overhead = pod_spec.get("overhead") or {}
    return (
        max(cpu, initial_cpu) + parse_quantity(overhead.get("cpu")),
        max(memory, initial_memory) + parse_quantity(overhead.get("memory")),
    )
