"""Run code in the one kernel of a server, which is started if there is none, and print its output.

Usage: cell.py URL TOKEN RUNTIME_DIR CODE.
Runs inside the machine under test, with the interpreter that has JupyterLab.
"""

import json
import sys
import urllib.request

from jupyter_client import BlockingKernelClient

url, token, runtime_dir, code = sys.argv[1:]
headers = {"Authorization": f"token {token}"}


def ask(body=None):
    request = urllib.request.Request(f"{url}api/kernels", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


kernel = (ask() or [ask(b"{}")])[0]["id"]
client = BlockingKernelClient(connection_file=f"{runtime_dir}/kernel-{kernel}.json")
client.load_connection_file()
# Without the heartbeat, since a kernel that is slow to start would count as dead.
client.start_channels(hb=False)
client.wait_for_ready(timeout=60)
reply = client.execute_interactive(code, timeout=60)
sys.exit(reply["content"]["status"] != "ok")
