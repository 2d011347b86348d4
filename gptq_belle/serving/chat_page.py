"""The chat page and its files. It is complete in itself: it loads nothing from other hosts."""

import html
import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles as FileServer

from gptq_belle.engine.sampling_params import DEFAULT_SAMPLING

router = APIRouter()
FOLDER = Path(__file__).parent / "static"
# Model output passes through DOMPurify; if that failed, this policy still blocks scripts, styles and other hosts.
PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; "
               "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
               "require-trusted-types-for 'script'; trusted-types dompurify")
SHOWN = ("temperature", "top_p", "top_k", "repetition_penalty")  # defaults that the settings show
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}  # with an ETag: an update is seen at once


class StaticFiles(FileServer):
    """Scripts, styles and fonts of the page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """The chat page, with the defaults of sampling that its settings show."""
    text = (FOLDER / "chat.html").read_text("utf-8")
    sampling = html.escape(json.dumps({name: getattr(DEFAULT_SAMPLING, name) for name in SHOWN}))
    return HTMLResponse(text.replace('data-sampling="{}"', f'data-sampling="{sampling}"'),
                        headers=HEADERS | {"Content-Security-Policy": PAGE_POLICY})
