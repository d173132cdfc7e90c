"""The error tree, drawn once. Each message says what, where, why and what to do now.

FarmError                    anything this project raises on purpose
|-- FarmlistError            farmlist.py is missing, broken or of the wrong shape (file and line)
|-- BadKey                   a key file (or FARM_KEY) that is missing, open to others, or holds no key
|-- BadFolder                the folder of a training cannot be written, or another training has it
|-- FarmUnreachable          no farm answered at an address
|-- FarmTimeout              nothing came in time
|-- FarmLost                 a farm that had answered is gone; its episodes end as truncated
|-- MessageDamaged           what came over the network is not what was sent; nothing of it was done
|-- ProtocolMismatch         farm and host speak different versions of the protocol
|-- FarmRefused              a farm answered, and said no
|   |-- NoSuchEnvironment    not in the farm's catalog (with close names)
|   |-- KeyRefused           its key is another one, or one side has none
|   |-- NoFreeSlot           more slots were asked for than are free
|   `-- LeaseLost            the lease is unknown to the farm: freed, or of another host
|-- NothingSent              `recv` was called with no command under way
|-- FarmerClosed             a verb of a farmer that was closed
|-- BadAction                an action of the wrong shape or with NaN: refused at the host, never sent
|-- BadSlot                  a slot that is not this pool's, or is busy, or has no episode
|-- NotOfAFarm               an attribute or a method that only the environment's own process could answer
`-- EnvironmentFault         the environment raised, or its worker died: the far traceback is in the text

StartError                   farm.py cannot offer an environment (on a farm machine only)
BlackBoxError                a black box cannot be read or played again (on a farm machine only)
"""


class FarmError(Exception):
    """Anything this project raises on purpose."""


class FarmlistError(FarmError):
    """farmlist.py is missing, broken or of the wrong shape; the text names file and line."""


class BadKey(FarmError):
    """A key file (or FARM_KEY) that is missing, not ours, open to others, or holds no key; nothing was sent."""


class BadFolder(FarmError):
    """The folder of a training cannot be written, or another training has it."""


class FarmUnreachable(FarmError):
    """No farm answered at an address."""


class FarmTimeout(FarmError, TimeoutError):
    """Nothing came in time; late results stay addressed to their own step."""


class FarmLost(FarmError):
    """A farm that had answered is gone; its episodes end as truncated."""


class MessageDamaged(FarmError):
    """What came over the network is not what was sent; nothing of it was done."""


class ProtocolMismatch(FarmError):
    """Farm and host speak different versions of the protocol."""


class FarmRefused(FarmError):
    """A farm answered, and said no."""


class NoSuchEnvironment(FarmRefused):
    """The environment is not in the farm's catalog."""


class KeyRefused(FarmRefused):
    """Host and farm have different keys, or only one of them has any; nothing was executed."""


class NoFreeSlot(FarmRefused):
    """More slots were asked for than are free."""


class LeaseLost(FarmRefused):
    """The lease is unknown to the farm: it was freed, or it is another host's."""


class NothingSent(FarmError):
    """`recv` was called with no command under way."""


class FarmerClosed(FarmError):
    """A verb of a farmer that was closed; nothing was sent."""


class BadAction(FarmError, ValueError):
    """An action of the wrong shape or with NaN: refused at the host, never sent."""


class BadSlot(FarmError, ValueError):
    """A slot that is not this pool's, or is busy, or has no episode."""


class NotOfAFarm(FarmError, AttributeError):
    """An attribute or a method that only the environment's own process could answer."""


class EnvironmentFault(FarmError):
    """The environment raised, or its worker died; the far traceback is in the text."""


class StartError(FarmError):
    """farm.py cannot offer an environment."""


class BlackBoxError(FarmError):
    """A black box cannot be read or played again; the text says what is wrong with the file."""


#: What may cross the wire as (name, text) and is raised under its own class on the host.
BY_NAME = {
    error.__name__: error
    for error in (FarmRefused, NoSuchEnvironment, NoFreeSlot, LeaseLost, MessageDamaged, ProtocolMismatch)
}


def from_wire(name: str, text: str) -> FarmError:
    """The exception for an error that a farm reported as strings."""
    return BY_NAME.get(name, FarmRefused)(text)
