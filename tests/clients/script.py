"""What scripts of clients in Python have in common. Their interpreter has nothing of this project."""

import json
import os
import traceback

URL = f"{os.environ['URL']}/v1"
KEY = os.environ["KEY"]
MODELS = json.loads(os.environ["MODELS"])


def run(*checks):
    """Run functions that return a text or raise an error; print a line of JSON for each."""
    for check in checks:
        try:
            passed, said = True, str(check())
        except Exception:
            passed, said = False, traceback.format_exc()[-900:]
        said = said.replace("\n", " ")[:300] if passed else said.replace("\n", " ")
        print(json.dumps({"check": check.__name__.replace("_", " "), "passed": passed, "said": said}), flush=True)
