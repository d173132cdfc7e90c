"""The farms that train.py may use. Copy this file to farmlist.py and put your machines in.

Each line is an address and the number of slots that you want there. On the machine itself you start

    python farm.py Pendulum-v1 --slots 4

which prints the line to paste here. The address is a name or a number; `:port` may follow it, and without
one it is 20099, the port that farm.py takes when you give it none. Ask for fewer slots than a farm offers, and
another host may have the rest. Without a farmlist.py, train.py starts a farm on this machine by itself.

A farm on another machine either stays on its own 127.0.0.1 and is reached by ssh: `ssh://user@host`, followed by
`:port` of its ssh and `/port` of its farm where they are others; your ~/.ssh/config counts. Or it listens on its
network with a key, which `train.py --key-file` names: docs/security.md.
"""

farmlist_base = [
    ("127.0.0.1", 4),  # this machine, port 20099: 4 slots
    ("ssh://user@192.168.1.33", 8),  # another one, through a tunnel that train.py opens: 8 slots
    # ("192.168.1.34:20100", 8),     # a third one, which listens there with a key: 8 slots
]
