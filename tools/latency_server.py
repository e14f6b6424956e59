"""A folder over HTTP/1.1 with byte ranges, each answer late: what an object store in the same region feels like.

python tools/latency_server.py FOLDER SECONDS    prints its port, serves until its stdin is closed
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable

from aiohttp import web


async def serve(folder: str, seconds: float) -> None:
    @web.middleware
    async def late(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await handler(request)

    app = web.Application(middlewares=[late])
    app.router.add_static("/", folder)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], float(sys.argv[2])))
