"""The only package that imports torch: documents (and masked-LM queries) in, sparse vectors out."""

import os
import threading

# Set in a forked process. It lacks the threads of OpenMP, and would wait for them forever.
forked = threading.Event()
os.register_at_fork(after_in_child=forked.set)
