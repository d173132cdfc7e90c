"""Builds the environment that the farm names: by a gym id, a module's factory, or a file's factory.

    build({"kind": "gym", "id": "Pendulum-v1"}, {"g": 9.8}, [])

A mistake in those words is answered with what was probably meant.

Runs unchanged on Python 2.7 to 3.13, with nothing but the standard library.
"""

import difflib
import importlib
import os
import sys

from adapt import takes_keyword


class NoSuchEnvironment(LookupError):
    """No environment, module, file or factory of that name."""


def build(spec, kwargs, folders):
    """Makes the environment.

    Args:
        spec: {"kind": "gym", "id"}, {"kind": "factory", "module", "factory"} or {"kind": "file", "file", "factory"}.
        kwargs: keyword arguments for its constructor.
        folders: where the farm said modules may be; they are on `sys.path` already, and named in errors.

    Raises:
        NoSuchEnvironment: nothing goes by that name; the text names what does.
        Exception: whatever the environment's own code raises.
    """
    kind = spec.get("kind")
    if kind == "gym":
        return _from_gym(spec["id"], kwargs, folders)
    if kind == "factory":
        return _factory(_module(spec["module"], folders), spec["factory"])(**kwargs)
    if kind == "file":
        return _factory(_file(spec["file"]), spec["factory"])(**kwargs)
    raise NoSuchEnvironment("an environment of kind %r; known are gym, factory and file" % (kind,))


# ---- gym and gymnasium ----


def _from_gym(name, kwargs, folders):
    """gymnasium's environment of that name, or else gym's: old simulators register with gym only."""
    module, _, bare = name.rpartition(":")
    if module:
        _module(module, folders)  # its import is what registers the name
    known = []
    libraries = []
    for library in ("gymnasium", "gym"):
        try:
            gym = importlib.import_module(library)
        except ImportError as error:
            if not _is_missing(error, library):
                raise
            continue
        libraries.append("%s %s" % (library, getattr(gym, "__version__", "")))
        try:
            return gym.make(bare, **_with_defaults(gym, kwargs))
        except gym.error.UnregisteredEnv:
            known += list(_registered(gym))
    if not libraries:
        raise NoSuchEnvironment("%r is an id of gymnasium or gym, and %s has neither" % (name, sys.executable))
    raise NoSuchEnvironment("no environment %r in %s%s" % (name, " or ".join(libraries), _close(bare, known)))


def _with_defaults(gym, kwargs):
    """Leaves out gym's checks of every step: they are for authors, slow, and those of gym 0.26 fail under numpy 2."""
    if takes_keyword(gym.make, "disable_env_checker"):
        kwargs = dict({"disable_env_checker": True}, **kwargs)
    return kwargs


def _registered(gym):
    registry = gym.envs.registry
    return getattr(registry, "env_specs", registry)  # gym before 0.26 wraps the dict


# ---- modules and files ----


def _module(name, folders):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not _is_missing(error, name):
            raise  # the module is there; something that it imports is not
        raise NoSuchEnvironment(
            "no module %r for Python %d.%d (%s); searched: %s"
            % ((name,) + sys.version_info[:2] + (sys.executable, ", ".join(folders + _other_folders(folders))))
        )


def _other_folders(folders):
    return [folder for folder in sys.path if folder and folder not in folders and os.path.isdir(folder)]


def _is_missing(error, name):
    """Whether an ImportError says that `name` itself is not there, and not something that it imports."""
    missing = getattr(error, "name", None)
    if sys.version_info[0] == 2:
        missing = str(error).split(" ")[-1] if str(error).startswith("No module named") else None
        if missing == name.split(".")[-1]:  # Python 2 names only the last part
            return True
    return missing is not None and (name == missing or name.startswith(missing + "."))


def _file(path):
    """Loads one file as a module, under a name of our own.

    Under its bare name `osim.py` would stand in the way of the very package that it imports.
    """
    if not os.path.isfile(path):
        raise NoSuchEnvironment("no file %s" % path)
    name = "farm_file_" + os.path.splitext(os.path.basename(path))[0]
    if sys.version_info[0] == 2:
        import imp

        return imp.load_source(name, path)
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _factory(module, name):
    factory = getattr(module, name, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        where = getattr(module, "__file__", module.__name__)
        raise NoSuchEnvironment("nothing callable named %r in %s%s" % (name, where, _close(name, public)))
    return factory


def _close(name, known):
    """The end of a sentence: the names that were probably meant, or else some of the known ones."""
    known = sorted(set(known))
    folded = {}
    for candidate in known:
        folded.setdefault(candidate.lower(), candidate)
    close = [folded[match] for match in difflib.get_close_matches(name.lower(), list(folded), 5, 0.5)]
    if close:
        return "; close names: " + ", ".join(close)
    return "; there are: " + ", ".join(known[:10]) if known else ""
