"""Cells of a notebook, run one after another in a running event loop, as IPython does.

usage: python notebook.py HOST:PORT
"""

import ast
import asyncio
import inspect
import sys

CELLS = [
    "import overlay",
    "leader = overlay.connect(ADDRESS)",
    "print(leader.call('blocking').result)",
    "print(list(leader.map(None, ['m', 'n'])))",
    "tasks = overlay.connect_async(ADDRESS)",
    "print((await tasks.call('awaited')).result)",
    "reply = tasks.submit(None, 'begun in one cell')",
    "print(await reply)",
    "async for result in tasks.map(None, ['o', 'p']): print(result)",
    "import asyncio; print(await asyncio.gather(*(tasks.call(n) for n in 'qr')) and 'gathered')",
    "print(leader.submit(None, 'both at once').result(10))",
    "tasks = overlay.connect_async(ADDRESS)  # the cell is run again, and the old client dropped",
    "print((await tasks.call('again')).result)",
    "await tasks.close(); leader.close()",
]


async def main():
    names = {"ADDRESS": sys.argv[1], "__name__": "__main__"}
    for cell in CELLS:
        code = compile(cell, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        made = eval(code, names)
        if inspect.isawaitable(made):
            await made


asyncio.run(main())
