"""PixStack, as ComfyUI finds it. Importing this imports nothing, so that the trainer and the tests can."""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    try:
        from .nodes import Extension
    except Exception:
        logging.exception("pixstack: the nodes could not be imported")  # ComfyUI logs only str(e) from here
        raise
    return Extension()
