"""Run the cases of one client against a server: `runner.py MODULE URL` prints {case: "ok" or the reason} as JSON.

A case is a function of a module in this folder whose name begins with `case_`; it gets the address of the API.
"""

import importlib
import json
import sys
import traceback


def outcome(case, url: str) -> str:
    try:
        case(url)
    except Exception:
        return traceback.format_exc()[-1500:]
    return "ok"


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    cases = {name.removeprefix("case_"): case for name, case in vars(module).items() if name.startswith("case_")}
    print(json.dumps({name: outcome(case, sys.argv[2]) for name, case in cases.items()}))
