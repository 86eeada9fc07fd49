"""HTTP methods in small letters, which Whetlab's Lua client sends, understood by a parser that knows only capitals.

httptools refuses ``get / HTTP/1.1`` before any application sees it, so a request's first letters are brought into
capitals as they come in; h11, which uvicorn takes where httptools is not installed, passes them on as they are, and
`api.whetlab` does the rest. Invariant: nothing but the method of a request is ever changed. What looks like one is put
before the parser alone, so that it is the parser who says whether a request begins there or the body of one goes on.
What follows a request for another protocol in one piece with it is for nobody, as where the parser gets it whole.
"""

from __future__ import annotations

import asyncio
import re

_SMALL = re.compile(rb"(?:get|put|post|patch|delete|head|options) (?=[/*h]|$)")


def http_protocol() -> type[asyncio.Protocol]:
    """What uvicorn is to speak HTTP with, for its setting `http`."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        return H11Protocol

    class AnyCase(HttpToolsProtocol):
        """Capitals for what comes in between two requests, also where the second comes in one piece with the first."""

        _between = True
        _upgraded = False

        def on_message_begin(self) -> None:
            self._between = False
            super().on_message_begin()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._between = True
            self._upgraded = self.parser.should_upgrade()

        def data_received(self, data: bytes) -> None:
            start = 0
            self._upgraded = False
            for small in _SMALL.finditer(data):
                if small.start() > start:
                    super().data_received(data[start : small.start()])
                    start = small.start()
                if self._upgraded or self.transport.is_closing():
                    return
                if self._between:
                    super().data_received(small[0].upper())
                    start = small.end()
            if start < len(data):
                super().data_received(data[start:] if start else data)

    return AnyCase
