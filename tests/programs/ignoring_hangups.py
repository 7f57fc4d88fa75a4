"""A program that runs another one as `nohup` does: ignoring_hangups.py PROGRAM WORD …"""

import os
import signal
import sys

signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
