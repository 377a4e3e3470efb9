"""What tox.ini derives from plugins/: an environment for each plugin and Python.

It gives each environment two names that tox.ini uses: ``{distributions}`` is what to install,
``{tests}`` which tests to run.
"""

from __future__ import annotations

from pathlib import Path

from tox.config.sets import ConfigSet, EnvConfigSet
from tox.plugin import impl

PLUGINS = [path.parent.name for path in Path(__file__).parent.glob("plugins/*/pyproject.toml")]


@impl
def tox_add_core_config(core_conf: ConfigSet) -> None:
    """Add each plugin to the environments that tox.ini lists."""
    envs = core_conf["env_list"].envs
    pythons = [name.removesuffix("core") for name in envs if name.endswith("-core")]
    envs.extend(python + plugin for plugin in sorted(PLUGINS) for python in pythons)


@impl
def tox_add_env_config(env_conf: EnvConfigSet) -> None:
    """Say what the environment of a plugin, of the core, or of all, installs and tests."""
    subject = (env_conf.name or "").rpartition("-")[2]
    plugins = PLUGINS if subject == "all" else {subject}.intersection(PLUGINS)
    paths = ["core", *(f"plugins/{name}" for name in sorted(plugins))]
    # The core is always named by its path: on the index the name belongs to others.
    installed = "\n".join(f"-e ./{path}[testing]" for path in paths)
    tests = "tests" if subject == "all" else f"{paths[-1]}/tests"
    env_conf.add_config("distributions", str, installed, "what to install")
    env_conf.add_config("tests", str, tests, "which tests to run")
