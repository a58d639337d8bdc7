"""The WSGI server: waitress, in one thread of this process, with its own errors as problems, too.

Waitress reads requests without a thread for each, so slow callers cost nothing; a thread is held
only while an answer is produced. Nor does it wait for slow readers: the next request of a
connection begins when the previous answer has been received.
"""
