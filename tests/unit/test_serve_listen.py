"""The socket that `whetstone serve` listens on."""

from __future__ import annotations

import asyncio
import socket

from cli.serve import listen


def test_an_answer_is_sent_at_once_and_waits_for_no_acknowledgement() -> None:
    at_once: list[int] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at_once.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def talk() -> None:
        with listen("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(answer, sock=listener)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()
            server.close()

    asyncio.run(talk())
    assert at_once == [1]
