"""The farms that train.py may use. Copy this file to farmlist.py and enter your machines.

Each entry is an address and the number of slots that you want there. On that machine, start

    python farm.py Pendulum-v1 --slots 4

which prints the line to paste here. The address is a name or a number. `:port` may follow it; without
a port it is 20099, the port that farm.py uses by default. If you ask for fewer slots than a farm offers,
another host may lease the rest. Without a farmlist.py, train.py starts a farm on this machine.

There are two ways to reach a farm on another machine. Either it listens on its own 127.0.0.1 and ssh leads to it:
`ssh://user@host`, followed by `:port` of its ssh and `/port` of its farm if they differ from the default; your
~/.ssh/config applies. Or it listens on its network with a key, which `train.py --key-file` names: docs/security.md.
"""

farmlist_base = [
    ("127.0.0.1", 4),  # this machine, port 20099: 4 slots
    ("ssh://user@192.168.1.33", 8),  # another one, through a tunnel that train.py opens: 8 slots
    # ("192.168.1.34:20100", 8),     # a third one, which listens there with a key: 8 slots
]
