"""What Jupyter Server loads beside Panel's extension: the preview of a lesson answers 403 to who has no token.

Panel's own answer is the way to a login page, which there is no use for where a token is the only key. With a password,
or under JupyterHub, there is somewhere to log in, and the way there stays.
"""

from __future__ import annotations

from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "app.jupyter"}]


def _load_jupyter_server_extension(server: Any) -> None:
    from jupyter_server.auth.identity import IdentityProvider, PasswordIdentityProvider
    from panel.io.jupyter_server_extension import PanelJupyterHandler
    from tornado.web import HTTPError

    class Preview(PanelJupyterHandler):
        async def get(self, path: str | None = None) -> None:
            provider = self.identity_provider
            by_token = type(provider) in (IdentityProvider, PasswordIdentityProvider)
            if by_token and self.current_user is None and not getattr(provider, "hashed_password", ""):
                raise HTTPError(403)
            await super().get(path)  # type: ignore[misc]  # tornado: None, or something to wait for

    base = server.web_app.settings["base_url"].rstrip("/")
    server.web_app.add_handlers(r".*$", [(rf"{base}/panel-preview/render/(.*)(?<!/ws)", Preview, {})])


load_jupyter_server_extension = _load_jupyter_server_extension
