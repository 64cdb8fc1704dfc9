"""Envelope encryption: a value opens in its own place, under its own key, and nowhere else."""

from __future__ import annotations

from uuid import uuid4

import pytest

from warehouse.postgres.codec import Codec, CodecError

PLACE = {"table": "clusters", "column": "k8s_token", "row": "r1"}


def test_a_value_comes_back_and_is_not_readable_at_rest():
    codec, customer = Codec("m" * 40), uuid4()
    data_key = codec.new_data_key(customer)
    sealed = codec.encrypt("canary-token", data_key=data_key, customer_id=customer, **PLACE)
    assert b"canary" not in sealed
    assert sealed != codec.encrypt("canary-token", data_key=data_key, customer_id=customer, **PLACE)
    assert codec.decrypt(sealed, data_key=data_key, customer_id=customer, **PLACE) == "canary-token"
    assert "m" * 40 not in repr(codec)


@pytest.mark.parametrize("change", [{"row": "r2"}, {"column": "k8s_ca"}, {"table": "nodes"}])
def test_a_value_moved_elsewhere_does_not_open(change):
    codec, customer = Codec("m" * 40), uuid4()
    data_key = codec.new_data_key(customer)
    sealed = codec.encrypt("x", data_key=data_key, customer_id=customer, **PLACE)
    with pytest.raises(CodecError):
        codec.decrypt(sealed, data_key=data_key, customer_id=customer, **(PLACE | change))


def test_another_customer_cannot_open_it_with_its_own_or_the_stolen_data_key():
    codec, customer, thief = Codec("m" * 40), uuid4(), uuid4()
    data_key = codec.new_data_key(customer)
    sealed = codec.encrypt("x", data_key=data_key, customer_id=customer, **PLACE)
    for stolen in (codec.new_data_key(thief), data_key):
        with pytest.raises(CodecError):
            codec.decrypt(sealed, data_key=stolen, customer_id=thief, **PLACE)


def test_a_changed_byte_is_noticed():
    codec, customer = Codec("m" * 40), uuid4()
    data_key = codec.new_data_key(customer)
    sealed = bytearray(codec.encrypt("x", data_key=data_key, customer_id=customer, **PLACE))
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(CodecError):
            codec.decrypt(bytes(changed), data_key=data_key, customer_id=customer, **PLACE)


def test_the_master_key_rotates_without_touching_values():
    old, customer = Codec("old" * 20), uuid4()
    data_key = old.new_data_key(customer)
    sealed = old.encrypt("x", data_key=data_key, customer_id=customer, **PLACE)
    both = Codec("new" * 20 + "," + "old" * 20)
    rewrapped = both.rewrap(data_key, customer)
    new = Codec("new" * 20)
    assert new.decrypt(sealed, data_key=rewrapped, customer_id=customer, **PLACE) == "x"
    with pytest.raises(CodecError, match="CLOUDOPTIM_MASTER_KEY"):
        new.decrypt(sealed, data_key=data_key, customer_id=customer, **PLACE)


def test_an_empty_master_key_is_refused():
    with pytest.raises(CodecError, match="CLOUDOPTIM_MASTER_KEY"):
        Codec(" , ")
