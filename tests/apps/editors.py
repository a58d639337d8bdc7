"""Two people edit a document together, in the environment of a Lab that has pycrdt.

Reads what opens their websockets from its standard input, a list of two objects of arguments of
`websocket.create_connection`. Each writes a line as soon as it has that of the other. Prints what
each of them has at the end.
"""

from __future__ import annotations

import json
import sys

import websocket
from pycrdt import (
    Doc,
    Text,
    YMessageType,
    create_sync_message,
    create_update_message,
    handle_sync_message,
)


class Editor:
    """One person's copy of the document."""

    def __init__(self, connection):
        self.opened = websocket.create_connection(**connection)
        self.document = Doc()
        self.document["source"] = self.text = Text()
        self.opened.send_binary(create_sync_message(self.document))

    def receive_until(self, wanted):
        while wanted not in str(self.text):
            message = self.opened.recv()
            if message[0] == YMessageType.SYNC:
                reply = handle_sync_message(message[1:], self.document)
                if reply is not None:
                    self.opened.send_binary(reply)

    def write(self, line):
        before = self.document.get_state()
        self.text += line
        self.opened.send_binary(create_update_message(self.document.get_update(before)))


first, second = map(Editor, json.load(sys.stdin))
first.receive_until("a shared file\n")
second.receive_until("a shared file\n")
first.write("the first was here\n")
second.receive_until("the first was here\n")
second.write("the second, too\n")
first.receive_until("the second, too\n")
json.dump([str(editor.text) for editor in (first, second)], sys.stdout)
for editor in (first, second):
    editor.opened.close()
