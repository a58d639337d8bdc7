"""A data platform with a JupyterLab for everyone who is signed in, inside its own page.

    LABKEEPER_URL=http://127.0.0.1:8000 LABKEEPER_TOKEN=... flask --app app run --port 5000

Replace the sign-in by that of your platform. The rest can stay.
"""

from __future__ import annotations

import os
import re
import secrets

from flask import Flask, abort, g, redirect, render_template, request, session, url_for

from labkeeper.client import Client
from labkeeper.core.errors import LabkeeperError, ServerFailed, ServerNotFound

app = Flask(__name__)
# With a fixed key, people stay signed in when the application restarts.
app.secret_key = os.environ.get("SECRET_KEY") or secrets.token_hex()
app.config.update(SESSION_COOKIE_SAMESITE="Lax", SESSION_COOKIE_NAME="platform")

# Threads share it. The token never reaches a browser.
keeper = Client(os.environ["LABKEEPER_URL"], token=os.environ["LABKEEPER_TOKEN"])


@app.before_request
def refuse_other_sites():
    """A Lab may share the site of this page, so SameSite cookies alone do not protect it."""
    if request.method == "POST" and request.headers.get("Sec-Fetch-Site") != "same-origin":
        abort(403, "This form was not sent by a page of this application.")


@app.before_request
def find_user():
    g.user = session.get("user")
    if g.user is None and request.endpoint not in {"page", "sign_in", "static"}:
        return redirect(url_for("page"))
    # The token is valid for names like this only.
    g.lab = f"lab-{g.user}"
    return None


@app.after_request
def forbid_frames(response):
    response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
    response.headers["Cache-Control"] = "no-store"
    return response


@app.get("/")
def page():
    server = None if g.user is None else find_server()
    return render_template("page.html", user=g.user, server=server)


def find_server():
    try:
        return keeper.get(g.lab)
    except ServerNotFound:
        # Its first start creates it.
        return None


@app.post("/lab/start")
def start():
    # Also finds, or starts, the one that exists: a second click does no harm.
    keeper.create(name=g.lab, labels={"user": g.user})
    return redirect(url_for("page"))


@app.post("/lab/stop")
def stop():
    keeper.stop(g.lab)
    return redirect(url_for("page"))


@app.get("/lab")
def lab():
    """Open the Lab. The link works once, so each visit gets a new one."""
    return redirect(keeper.link(g.lab).url)


@app.post("/sign-in")
def sign_in():
    user = request.form["user"]
    if not re.fullmatch(r"[a-z][a-z0-9]{0,19}", user):
        abort(400, "A name has 1 to 20 lowercase letters and digits, and begins with a letter.")
    session["user"] = user
    return redirect(url_for("page"))


@app.post("/sign-out")
def sign_out():
    session.clear()
    return redirect(url_for("page"))


@app.errorhandler(LabkeeperError)
def explain(error):
    """Show what the keeper reports: the cause, and for a failed start the end of its log."""
    lines = error.details["log_tail"] if isinstance(error, ServerFailed) else ()
    return render_template("error.html", message=error.message, lines=lines), 502
