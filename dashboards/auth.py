"""Who is looking: sign-in through the control service, a signed cookie, and the tenant that follows from it.

The cookie holds a signed random id only; what it stands for (person, role, tenant, tokens) stays in this process, so
nothing a browser sends can name a tenant, and a restart of the dashboards signs people out. In the sandbox a person
on this machine is signed in as its administrator without a password.
"""

from __future__ import annotations

import ipaddress
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from bokeh.server.auth_provider import AuthProvider
from bokeh.util.token import get_session_id
from markupsafe import Markup
from tornado.httputil import HTTPServerRequest
from tornado.web import RequestHandler, create_signed_value, decode_signed_value

from dashboards.api import ApiError, ControlApi
from dashboards.config import DashboardSettings

COOKIE = "cloudoptim_dashboards"
PLATFORM_ADMIN = "platform_admin"
ROLES_WITH_PAGES = (PLATFORM_ADMIN, "customer_admin", "analyst")
MAX_LOGINS = 10_000


@dataclass
class Login:
    """One signed-in person. ``customer_id`` is the tenant of every query; only a platform admin may move it."""

    name: str
    role: str
    customer_id: UUID | None
    expires_at: float
    credential: str = field(repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def platform_admin(self) -> bool:
        """True when this person may look at any customer and act on platform resources."""
        return self.role == PLATFORM_ADMIN


class Logins:
    """All signed-in people of this process, by the id in their cookie."""

    def __init__(self, secret: str, session_hours: float) -> None:
        self.secret = secret
        self.session_seconds = session_hours * 3600
        self._by_id: dict[str, Login] = {}
        self._page_owner: dict[str, str] = {}

    def add(self, login: Login) -> Login:
        """Remember a login; expired ones are forgotten, and the oldest where there are too many."""
        now = time.time()
        self._by_id = {key: known for key, known in self._by_id.items() if known.expires_at > now}
        while len(self._by_id) >= MAX_LOGINS:
            self._by_id.pop(next(iter(self._by_id)))
        self._by_id[login.id] = login
        return login

    def remove(self, login: Login) -> None:
        """Sign out: the cookie's id stands for nothing from now on."""
        self._by_id.pop(login.id, None)

    def of(self, login_id: str | None) -> Login | None:
        """The login of that id, or None when it is unknown or over."""
        login = self._by_id.get(login_id or "")
        if login is None or login.expires_at <= time.time():
            return None
        return login

    def open_page(self, session_id: str, login: Login) -> None:
        """Note whose page a Bokeh session is."""
        self._page_owner[session_id] = login.id

    def close_page(self, session_id: str) -> None:
        """Forget a Bokeh session that ended."""
        self._page_owner.pop(session_id, None)

    def owns(self, login: Login, page_token: str) -> bool:
        """False when the page of that token was made for somebody else. A page this process does not know will be
        made anew, with the data of whoever asks."""
        try:
            return self._page_owner.get(get_session_id(page_token), login.id) == login.id
        except (ValueError, KeyError):
            return False

    def cookie_value(self, login: Login) -> str:
        """The signed cookie that stands for the login."""
        return create_signed_value(self.secret, COOKIE, login.id).decode()

    def from_request(self, request: HTTPServerRequest) -> Login | None:
        """The login of the request's cookie, or None when there is no cookie, or it is forged, old or unknown."""
        morsel = request.cookies.get(COOKIE)
        if morsel is None:
            return None
        days = self.session_seconds / 86_400
        signed = decode_signed_value(self.secret, COOKIE, morsel.value, max_age_days=days)
        return self.of(signed.decode()) if signed else None


def is_loopback(address: str) -> bool:
    """True for an address or host name of this machine's loopback."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def may_enter_without_password(settings: DashboardSettings, request: HTTPServerRequest) -> bool:
    """True in the sandbox for a direct request from this machine.

    The Host header is checked too, since a foreign page can make a browser resolve its own name to loopback; a
    forwarding header means that somebody else asks through a proxy.
    """
    host = urlsplit(f"//{request.host}").hostname or ""
    return (
        settings.sandbox
        and bool(settings.admin_api_key.get_secret_value())
        and is_loopback(request.remote_ip or "")
        and is_loopback(host)
        and "X-Forwarded-For" not in request.headers
        and "Forwarded" not in request.headers
    )


def safe_next(target: str | None) -> str:
    """A path of ours to go on to; anything that could lead elsewhere becomes ``/``."""
    if not target or not target.startswith("/") or target.startswith(("//", "/\\")) or "\\" in target:
        return "/"
    if any(ord(character) < 32 for character in target):
        return "/"
    return target


class LoginAuth(AuthProvider):
    """Bokeh's hooks: no page and no WebSocket without a login."""

    def __init__(self, logins: Logins) -> None:
        self.logins = logins
        super().__init__()

    @property
    def get_user(self):
        """The login of a request. A WebSocket must come from the person whose page it serves."""

        def user(handler: RequestHandler) -> Login | None:
            login = self.logins.from_request(handler.request)
            if login is not None and (page_token := _page_token(handler.request)) is not None:
                return login if self.logins.owns(login, page_token) else None
            return login

        return user

    @property
    def login_url(self) -> str:
        """Where an unknown visitor is sent."""
        return "/login"


def _page_token(request: HTTPServerRequest) -> str | None:
    """The page's token on a WebSocket's opening request, where it is the second subprotocol."""
    protocols = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
    return protocols[1] if len(protocols) == 2 and protocols[0] == "bokeh" else None


class BaseHandler(RequestHandler):
    """What the dashboards' own plain pages share."""

    def initialize(self, settings: DashboardSettings, logins: Logins, api: ControlApi) -> None:
        """Called by Tornado with the routing table's arguments."""
        self.dashboard_settings = settings
        self.logins = logins
        self.api = api

    def set_default_headers(self) -> None:
        """Nothing of these pages may be kept by caches."""
        self.set_header("Cache-Control", "no-store")

    def check_same_origin(self) -> bool:
        """True unless another site's page sent this form."""
        origin = self.request.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc == self.request.host

    def remember(self, login: Login) -> None:
        """Set the cookie: not readable by scripts, not sent by other sites' forms."""
        self.logins.add(login)
        self.set_cookie(
            COOKIE,
            self.logins.cookie_value(login),
            httponly=True,
            samesite="Lax",
            secure=self.request.protocol == "https",
            max_age=int(self.logins.session_seconds),
        )


class LoginHandler(BaseHandler):
    """Sign in with the control service's users, or straight in on the sandbox's own machine."""

    def get(self) -> None:
        """The form; the sandbox signs in at once unless the person has just signed out."""
        target = safe_next(self.get_query_argument("next", "/"))
        may_enter = may_enter_without_password(self.dashboard_settings, self.request)
        if may_enter and self.get_query_argument("out", None) is None:
            self.enter_sandbox(target)
            return
        self.show(target, "")

    async def post(self) -> None:
        """Check the credentials at the control service."""
        target = safe_next(self.get_body_argument("next", "/"))
        if not self.check_same_origin():
            self.set_status(403)
            self.show(target, "The form came from another site and was refused.")
            return
        if self.get_body_argument("sandbox", None) is not None:
            if may_enter_without_password(self.dashboard_settings, self.request):
                self.enter_sandbox(target)
            else:
                self.set_status(403)
                self.show(target, "Signing in without a password works in the sandbox and on its own machine only.")
            return
        email, password = self.get_body_argument("email", "").strip(), self.get_body_argument("password", "")
        try:
            answer = await self.api.token(email, password)
            login = self.login_of(email, answer)
        except ApiError as error:
            self.set_status(error.status or 502)
            self.show(target, str(error), email=email)
            return
        if login.role not in ROLES_WITH_PAGES:
            self.set_status(403)
            self.show(target, f"The role {login.role} has no pages here; sign in as an analyst or administrator.")
            return
        self.remember(login)
        self.redirect(target)

    def login_of(self, email: str, answer: dict[str, Any]) -> Login:
        """The login that an answer of POST /auth/token stands for."""
        try:
            customer = answer.get("customer_id")
            return Login(
                name=str(answer.get("email") or email),
                role=str(answer["role"]),
                customer_id=UUID(str(customer)) if customer else None,
                expires_at=time.time() + self.logins.session_seconds,
                credential=str(answer["access_token"]),
                refresh_token=answer.get("refresh_token"),
            )
        except (KeyError, ValueError) as error:
            raise ApiError("The control service's answer to the sign-in cannot be read.", 502) from error

    def enter_sandbox(self, target: str) -> None:
        """Sign in as the sandbox's administrator."""
        key = self.dashboard_settings.admin_api_key.get_secret_value()
        self.remember(
            Login(
                name="sandbox administrator",
                role=PLATFORM_ADMIN,
                customer_id=None,
                expires_at=time.time() + self.logins.session_seconds,
                credential=key,
            )
        )
        self.redirect(target)

    def show(self, target: str, message: str, *, email: str = "") -> None:
        """Write the form."""
        sandbox = may_enter_without_password(self.dashboard_settings, self.request)
        self.finish(login_page(target, message, email=email, sandbox=sandbox))


class LogoutHandler(BaseHandler):
    """Sign out."""

    async def get(self) -> None:
        """Forget the login here, in the browser and at the control service."""
        if login := self.logins.from_request(self.request):
            self.logins.remove(login)
            with suppress(ApiError):
                await self.api.sign_out(login)
        self.clear_cookie(COOKIE)
        self.redirect("/login?out=1")


_LOGIN_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Sign in · CloudOptim</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="/assets/mark.svg"><link rel="stylesheet" href="/assets/login.css"></head>
<body><main><img src="/assets/mark.svg" alt="" width="40" height="40"><h1>CloudOptim</h1>
<p class="lead">Sign in with your CloudOptim user.</p>{message}
<form method="post" action="/login"><input type="hidden" name="next" value="{target}">
<label>E-mail<input name="email" type="email" autocomplete="username" value="{email}" required autofocus></label>
<label>Password<input name="password" type="password" autocomplete="current-password" required></label>
<button>Sign in</button></form>{sandbox}</main></body></html>"""

_SANDBOX_ENTRY = """<form method="post" action="/login" class="sandbox">
<input type="hidden" name="next" value="{target}"><input type="hidden" name="sandbox" value="1">
<p>This is a sandbox on your own machine; no password is needed.</p>
<button class="quiet">Enter as sandbox administrator</button></form>"""


def login_page(target: str, message: str, *, email: str = "", sandbox: bool = False) -> str:
    """The sign-in page; every value is escaped."""
    return Markup(_LOGIN_PAGE).format(
        target=target,
        email=email,
        message=Markup('<p class="error" role="alert">{}</p>').format(message) if message else "",
        sandbox=Markup(_SANDBOX_ENTRY).format(target=target) if sandbox else "",
    )
