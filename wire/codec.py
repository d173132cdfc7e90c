"""Nested Python and numpy values to bytes and back: what every observation and action travels in.

    data = encode((observation, 1.0, False, False, {"lives": 3}))
    observation, reward, terminated, truncated, info = decode(data)

Messages that differ in the bytes of their buffers only, as those of all steps of an environment mostly do, need no
header built or read but once:

    form = Form(data)
    more = form.encode(other_array.tobytes())  # what `encode` would give
    start = form.start_in(more)                # where the buffers begin; None when it is no message of this form

Layout:

    4 bytes   magic, with the version of the layout
    u32       crc32 of everything that follows
    u32       length of the header
    header    JSON in ASCII
    buffers   the raw bytes of arrays, one after the other, in the header's order

In the header `null`, `true`, numbers, strings and objects stand for themselves (an object is a dict with text
keys). A JSON array is always marked by its first element:

    ["l", ...] list         ["t", ...] tuple       ["s", ...] set          ["f", ...] frozenset
    ["d", k, v, k, v, ...] dict with other keys    ["i", hex] an int that JSON readers would not take whole
    ["c", real, imag] complex                      ["b", n] bytes, n of them in the buffers
    ["a", dtype, d0, d1, ...] array                ["n", dtype] numpy scalar
    ["nu", text] numpy text scalar                 ["nb", n] numpy bytes scalar

Subclasses arrive as their base (a namedtuple as a tuple, an IntEnum as an int). On Python 2 a `str` that is valid
UTF-8 counts as text, any other as bytes; text that is ASCII arrives there as `str`. Where dicts keep no order
(before Python 3.6) an OrderedDict arrives. A long double travels as its raw bytes, so it is only good between
machines of one kind.

This file runs unchanged on Python 2.7 to 3.13, with nothing but the standard library and numpy.
"""

import binascii
import collections
import json.decoder
import json.encoder
import re
import struct
import sys

import numpy

MAGIC = b"FRM1"
MAX_DEPTH = 100  #: levels of nesting; both ends stop there, far from any interpreter's own limit

_PY2 = sys.version_info[0] == 2
_TEXT = type(b"".decode("ascii"))  # `unicode` on Python 2; a formatter would take the u from u""
_INTS = (int, long) if _PY2 else (int,)  # type: ignore[name-defined]  # noqa: F821
_DICT = dict if sys.version_info >= (3, 6) else collections.OrderedDict
_FRONT = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")
_FRONT_SUM = struct.Struct("<4sI")
_crc32 = binascii.crc32


class CodecError(ValueError):
    """A value that cannot be sent, or bytes that are no message.

    Attributes:
        path: where in the value the trouble is, like "['a'][2]"; empty for the value itself and for bytes.
    """

    def __init__(self, text, path=""):
        super(CodecError, self).__init__(text)
        self.path = path


class _Refused(Exception):
    """No way to encode this object; `encode` turns it into a CodecError that says where it is."""


# ---------------------------------------------------------------------------------------------------------------
# Value to tree. Each function gets the object, the list of buffers so far, the caller's `default` and the depth.
# ---------------------------------------------------------------------------------------------------------------

_PLAIN = frozenset([type(None), bool, float, _TEXT])  #: JSON has them as they are (NaN and infinities as well)
_JSON_INT = 1 << 63
_DTYPE_NAME = re.compile(r"[<>|](?:[biufc][0-9]{1,2}|[SU][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[a-zA-Z]{1,7}\])?)\Z")
_MAX_KNOWN = 512  #: entries a cache may hold; a peer that invents dtypes must not fill the memory

#: dtype -> its name in the header
_names = {}  # type: dict
#: the same, the other way round
_dtypes = {}  # type: dict


def _name_of(dtype):
    """The name that stands for a dtype in the header; None when its values are not plain bytes."""
    name = dtype.str
    # A structured dtype calls itself "V8", and so would arrive without its fields; one with Python objects "O".
    if dtype.kind not in "biufcSUmM" or not dtype.itemsize or not _DTYPE_NAME.match(name):
        return None
    if len(_names) < _MAX_KNOWN:
        _names[dtype] = name
    return name


def _tree(obj, buffers, default, depth):
    kind = type(obj)
    if kind in _PLAIN:
        return obj
    return _ENCODERS.get(kind, _tree_of_other)(obj, buffers, default, depth)


def _tree_of_int(obj, buffers, default, depth):
    if -_JSON_INT <= obj < _JSON_INT:
        return int(obj)
    # Python refuses to read very long decimal numbers, and older ones need quadratic time for them.
    return ["i", ("%x" % obj)]


def _tree_of_complex(obj, buffers, default, depth):
    return ["c", obj.real, obj.imag]


def _tree_of_bytes(obj, buffers, default, depth):
    buffers.append(bytes(obj))
    return ["b", len(obj)]


def _tree_of_py2_str(obj, buffers, default, depth):
    try:
        return obj.decode("utf-8")
    except UnicodeDecodeError:
        return _tree_of_bytes(obj, buffers, default, depth)


def _items_with(mark):
    def tree_of_items(obj, buffers, default, depth):
        if depth >= MAX_DEPTH:
            raise CodecError("cannot encode: nested more than %d levels deep, or containing itself" % MAX_DEPTH)
        depth += 1
        node = [mark]
        for item in obj:
            kind = type(item)
            if kind in _PLAIN:
                node.append(item)
            else:
                node.append(_ENCODERS.get(kind, _tree_of_other)(item, buffers, default, depth))
        return node

    return tree_of_items


_tree_of_pairs = _items_with("d")


def _tree_of_dict(obj, buffers, default, depth):
    if not obj:
        return {}
    if depth >= MAX_DEPTH:
        raise CodecError("cannot encode: nested more than %d levels deep, or containing itself" % MAX_DEPTH)
    for key in obj:
        if type(key) is not str or (_PY2 and not _is_ascii(key)):
            return _tree_of_pairs([part for pair in obj.items() for part in pair], buffers, default, depth)
    depth += 1
    return _DICT([(key, _tree(obj[key], buffers, default, depth)) for key in obj])


def _tree_of_array(obj, buffers, default, depth):
    dtype = obj.dtype
    name = _names.get(dtype) or _name_of(dtype)
    if name is None:
        if dtype.kind in "SU" and not dtype.itemsize:
            # numpy itself turns zero-length strings into one-character ones nearly everywhere.
            return _tree_of_array(obj.astype(dtype.kind + "1"), buffers, default, depth)
        return _tree_by_default(obj, buffers, default, depth)
    buffers.append(obj.tobytes())  # in C order, whatever the order in memory
    return ["a", name] + list(obj.shape)


def _tree_of_scalar(obj, buffers, default, depth):
    # Text and bytes first: in an array they would lose the zeros at their end.
    if isinstance(obj, _TEXT):
        return ["nu", _bare_text(obj)]
    if isinstance(obj, bytes):
        buffers.append(bytes(obj))
        return ["nb", len(obj)]
    dtype = obj.dtype
    name = _names.get(dtype) or _name_of(dtype)
    if name is None:
        return _tree_by_default(obj, buffers, default, depth)
    buffers.append(obj.tobytes())
    return ["n", name]


def _tree_of_other(obj, buffers, default, depth):
    """Subclasses of what we know, or else whatever `default` makes of the object."""
    if not isinstance(obj, numpy.ma.MaskedArray):  # its mask would be lost on the way
        for base, encoder in _BASES:
            if isinstance(obj, base):
                return encoder(obj, buffers, default, depth)
    return _tree_by_default(obj, buffers, default, depth)


def _tree_by_default(obj, buffers, default, depth):
    if default is None:
        raise _Refused(obj)
    if depth >= MAX_DEPTH:
        raise CodecError("cannot encode: `default` never came to an end")
    return _tree(default(obj), buffers, default, depth + 1)


def _bare_text(obj):
    """The characters of a text of any subclass; its own `__str__` may say something else, and numpy's drops zeros."""
    return _TEXT.__getitem__(obj, slice(None))


#: What a subclass is taken for. numpy first: its float64 is a float as well.
_BASES = [
    (numpy.generic, _tree_of_scalar),
    (numpy.ndarray, _tree_of_array),
    (dict, _tree_of_dict),
    (tuple, _items_with("t")),
    (list, _items_with("l")),
    (frozenset, _items_with("f")),
    (set, _items_with("s")),
    (_TEXT, lambda obj, buffers, default, depth: _bare_text(obj)),
    (bytes, _tree_of_py2_str if _PY2 else _tree_of_bytes),
    (_INTS, _tree_of_int),
    (float, lambda obj, buffers, default, depth: float(obj)),
    (complex, _tree_of_complex),
]

_ENCODERS = {}
for _base, _encoder in _BASES:
    for _kind in _base if isinstance(_base, tuple) else (_base,):
        _ENCODERS[_kind] = _encoder
for _code in "?bBhHiIlLqQefdgFDGmM":
    _ENCODERS[numpy.dtype(_code).type] = _tree_of_scalar


def _is_ascii(text):
    try:
        text.encode("ascii")
    except UnicodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------
# Tree to bytes, and the public end of it.
# ---------------------------------------------------------------------------------------------------------------

_encoder_of_json = json.encoder.JSONEncoder(check_circular=False, separators=(",", ":"))


def _plain_dumps():
    """A function from tree to JSON text.

    `JSONEncoder.encode` builds its C encoder anew in every call, which costs more than the encoding of a small
    tree. Where this interpreter's C encoder is of the known form we keep one.
    """
    make = getattr(json.encoder, "c_make_encoder", None)
    try:
        chunks = make(None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
        dumps = lambda tree: "".join(chunks(tree, 0))  # noqa: E731
        if dumps(["a", {"b": 0.5}, None]) == '["a",{"b":0.5},null]':
            return dumps
    except Exception:  # whatever an unknown interpreter raises, the documented way below works
        pass
    return _encoder_of_json.encode


_dumps = _plain_dumps()


def encode(obj, default=None):
    """Turns a nested value into bytes.

    Args:
        obj: None, bool, int, float, complex, str, bytes, numpy arrays and scalars of any dtype without Python
            objects or fields, and lists, tuples, dicts and sets of those.
        default: called with each object that cannot be encoded; what it returns is sent in its place.

    Returns:
        The message as bytes, for `decode`.

    Raises:
        CodecError: something in `obj` cannot be sent; the text names the path to it.
    """
    buffers = []
    try:
        tree = _tree(obj, buffers, default, 0)
    except _Refused as refused:
        culprit = refused.args[0]
    else:
        header = _dumps(tree).encode("ascii")
        length = _LENGTH.pack(len(header))
        crc = _crc32(header, _crc32(length))
        for buffer in buffers:
            crc = _crc32(buffer, crc)
        return b"".join([MAGIC, _LENGTH.pack(crc & 0xFFFFFFFF), length, header] + buffers)
    path = _path_to(culprit, obj, 0) or ""
    what = type(culprit).__name__
    if isinstance(culprit, (numpy.ndarray, numpy.generic)):
        what += " of dtype %s" % (culprit.dtype,)
    raise CodecError("cannot encode value%s: no way to send a %s" % (path, what), path)


def _path_to(culprit, obj, depth):
    """Where in `obj` the very object `culprit` is, as Python would write it; None when it is not there."""
    if obj is culprit:
        return ""
    if depth > MAX_DEPTH:
        return None
    if isinstance(obj, dict):
        children = [("[%r]" % (key,), value) for key, value in obj.items()]
        children += [(".keys()", key) for key in obj]
    elif isinstance(obj, (list, tuple)):
        children = [("[%d]" % index, value) for index, value in enumerate(obj)]
    elif isinstance(obj, (set, frozenset)):
        children = [("{...}", value) for value in obj]
    else:
        return None
    for step, child in children:
        path = _path_to(culprit, child, depth + 1)
        if path is not None:
            return step + path
    return None


# ---------------------------------------------------------------------------------------------------------------
# Bytes to value. Each function gets its node, the reader and the depth.
# ---------------------------------------------------------------------------------------------------------------


class _Reader(object):
    """The buffers of one message, taken one after the other."""

    __slots__ = ("data", "at")

    def __init__(self, data, at):
        self.data = data
        self.at = at

    def take(self, length):
        """The next `length` bytes; a length that is not there is refused before anything is allocated."""
        start = self.at
        if type(length) not in _INTS or not 0 <= length <= len(self.data) - start:
            raise CodecError("not a message: a buffer of %r bytes, %d are left" % (length, len(self.data) - start))
        self.at = start + length
        return self.data[start : self.at]


def _dtype_of(name):
    if not _DTYPE_NAME.match(name):
        raise CodecError("not a message: dtype %.50r" % (name,))
    dtype = numpy.dtype(str(name))
    if not dtype.itemsize:
        raise CodecError("not a message: dtype %r has no size" % (name,))
    if len(_dtypes) < _MAX_KNOWN:
        _dtypes[name] = dtype
    return dtype


def _build(node, reader, depth):
    kind = type(node)
    if kind is list:
        if depth >= MAX_DEPTH:
            raise CodecError("not a message: nested more than %d levels deep" % MAX_DEPTH)
        return _BUILDERS[node[0]](node, reader, depth + 1)
    if kind is _DICT:
        if depth >= MAX_DEPTH:
            raise CodecError("not a message: nested more than %d levels deep" % MAX_DEPTH)
        depth += 1
        return _DICT([(_native(key), _build(value, reader, depth)) for key, value in node.items()]) if node else node
    return _native(node)


if _PY2:

    def _native(value):
        return value.encode("ascii") if type(value) is _TEXT and _is_ascii(value) else value

else:

    def _native(value):
        return value


def _build_list(node, reader, depth):
    values = []
    for position in range(1, len(node)):
        item = node[position]
        kind = type(item)
        values.append(_build(item, reader, depth) if kind is list or kind is _DICT or _PY2 else item)
    return values


def _build_pairs(node, reader, depth):
    parts = _build_list(node, reader, depth)
    if len(parts) % 2:
        raise CodecError("not a message: a dict with a key but no value")
    return _DICT(zip(parts[::2], parts[1::2]))


def _build_int(node, reader, depth):
    _, digits = node
    if not re.match(r"-?[0-9a-f]{16,}\Z", digits):
        raise CodecError("not a message: a number of the digits %.50r" % (digits,))
    return int(digits, 16)


def _build_complex(node, reader, depth):
    _, real, imag = node
    if type(real) is not float or type(imag) is not float:
        raise CodecError("not a message: a complex number of %.50r" % (node,))
    return complex(real, imag)


def _build_array(node, reader, depth):
    name = node[1]
    dtype = _dtypes.get(name) or _dtype_of(name)
    data = reader.data
    start = reader.at
    shape = node[2:]
    if shape and min(shape) < 0:
        raise CodecError("not a message: an array of shape %.50r" % (shape,))
    if start == len(data):  # numpy takes no offset at the very end, not even for an array without elements
        data = b""
        start = 0
    # No copy yet: numpy checks dimensions and their product against the bytes that are really there.
    array = numpy.ndarray(shape, dtype, data, start) if data else _build_empty(shape, dtype)
    reader.at += array.nbytes
    if dtype.kind == "U":
        _check_text(array)
    return array.copy()


def _build_empty(shape, dtype):
    if 0 not in shape:
        raise CodecError("not a message: an array of shape %.50r with no bytes left" % (shape,))
    return numpy.empty(shape, dtype)


def _check_text(array):
    """Refuses what is no text: reading such an element would fail later, far from here."""
    points = numpy.frombuffer(array.tobytes(), array.dtype.byteorder + "u4")
    if points.size and points.max() > 0x10FFFF:
        raise CodecError("not a message: an array of text holds %d, which is no character" % points.max())


def _build_scalar(node, reader, depth):
    _, name = node
    dtype = _dtypes.get(name) or _dtype_of(name)
    if dtype.kind in "SU":
        raise CodecError("not a message: a numpy scalar of dtype %s" % name)
    return numpy.frombuffer(reader.take(dtype.itemsize), dtype)[0]


def _build_bytes(node, reader, depth):
    _, length = node
    return bytes(reader.take(length))


def _build_numpy_text(node, reader, depth):
    _, text = node
    if type(text) not in (_TEXT, str):
        raise CodecError("not a message: a numpy text of %.50r" % (text,))
    return numpy.dtype("U1").type(text)


_BUILDERS = {
    "a": _build_array,
    "n": _build_scalar,
    "t": lambda node, reader, depth: tuple(_build_list(node, reader, depth)),
    "l": _build_list,
    "d": _build_pairs,
    "s": lambda node, reader, depth: set(_build_list(node, reader, depth)),
    "f": lambda node, reader, depth: frozenset(_build_list(node, reader, depth)),
    "b": _build_bytes,
    "i": _build_int,
    "c": _build_complex,
    "nu": _build_numpy_text,
    "nb": lambda node, reader, depth: numpy.dtype("S1").type(_build_bytes(node, reader, depth)),
}


def _short_int(digits):
    if len(digits) > 20:  # the encoder sends longer ones in hex, and Python is slow on them
        raise CodecError("not a message: a number of %d digits" % len(digits))
    return int(digits)


_decoder_of_json = json.decoder.JSONDecoder(parse_int=_short_int, object_pairs_hook=None if _DICT is dict else _DICT)
_scan = getattr(_decoder_of_json, "scan_once")  # noqa: B009  (its `decode` only adds checks for white space)

#: float32 numbers up to which a look at their uppermost bytes costs less than a ufunc that is in no cache.
FEW_FLOATS = 4096


def surely_finite(data):
    """Whether no float32 among these bytes is NaN, infinite or beyond 1.7e38; if False, one may still be finite.

    The uppermost byte of one in little-endian order has its sign and most of its exponent: all ones in those.
    """
    tops = data[3::4]
    return b"\x7f" not in tops and b"\xff" not in tops


#: What a broken message can set off in the standard library and numpy.
_TROUBLE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    RuntimeError,  # RecursionError, under its name in Python 2
    StopIteration,
    struct.error,
)


def decode(data, crc=None):
    """Turns the bytes of `encode` back into the value.

    Arrays are writable and own their memory. Nothing is allocated that is larger than the message itself.

    Args:
        data: bytes.
        crc: the CRC-32 of all but its first 8 bytes, where the caller has it.

    Returns:
        The value.

    Raises:
        CodecError: `data` is cut, changed, too long, or was never a message. Nothing else is raised.
    """
    try:
        magic, told, length = _FRONT.unpack_from(data)
        if magic != MAGIC:
            raise CodecError("not a message: it begins with %r, not with %r" % (magic, MAGIC))
        if (_crc32(memoryview(data)[8:]) & 0xFFFFFFFF if crc is None else crc) != told:
            raise CodecError("a damaged message: the checksum of its %d bytes is wrong" % len(data))
        end = 12 + length
        if end > len(data):
            raise CodecError("not a message: a header of %d bytes in %d" % (length, len(data)))
        header = data[12:end].decode("ascii")
        tree, read = _scan(header, 0)
        if read != len(header):
            raise CodecError("not a message: its header goes on after its end")
        reader = _Reader(data, end)
        value = _build(tree, reader, 0)
        if reader.at != len(data):
            raise CodecError("not a message: %d bytes too many" % (len(data) - reader.at))
        return value
    except CodecError:
        raise
    except _TROUBLE as error:
        raise CodecError("not a message: %s: %s" % (type(error).__name__, error))


class Form(object):
    """Messages with one and the same header, made and read without looking into it again.

    Attributes:
        front: the header with its length, as it stands in the message; what tells forms apart.
    """

    __slots__ = ("_crc", "_size", "_start", "front")

    def __init__(self, data):
        """Takes the form of a message that `encode` made or `decode` has taken."""
        self._start = 12 + _LENGTH.unpack_from(data, 8)[0]
        self._size = len(data)
        self.front = data[8 : self._start]
        self._crc = _crc32(self.front)

    def encode(self, *buffers):
        """A message with these buffers, bytes all of them; together they are as long as those of the first one."""
        crc = self._crc
        for buffer in buffers:
            crc = _crc32(buffer, crc)
        return b"".join((_FRONT_SUM.pack(MAGIC, crc & 0xFFFFFFFF), self.front) + buffers)

    def pieces(self, *buffers):
        """The same message as pieces in a row, of which the last are these buffers, uncopied."""
        crc = self._crc
        for buffer in buffers:
            crc = _crc32(buffer, crc)
        return (_FRONT_SUM.pack(MAGIC, crc & 0xFFFFFFFF), self.front) + buffers

    def start_in(self, data, crc=None):
        """Where the buffers begin in a message of this form; None for any other, and for one that is damaged.

        Args: as of `decode`.
        """
        if len(data) != self._size or not data.startswith(self.front, 8):
            return None
        magic, told = _FRONT_SUM.unpack_from(data)
        if crc is None:
            crc = _crc32(memoryview(data)[self._start :], self._crc) & 0xFFFFFFFF
        if magic != MAGIC or crc != told:
            return None
        return self._start


def front_of(data):
    """The header of a message with its length, by which a form can be found; of what is no message, any bytes."""
    return data[8 : 12 + _LENGTH.unpack_from(data, 8)[0]] if len(data) >= 12 else b""
