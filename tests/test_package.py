"""What `import equigemma` offers: public names, a version, types for type checkers."""

import pydoc
import sys
from importlib.metadata import version
from importlib.resources import files

import equigemma as eg


def test_every_public_name_is_there_and_in_dir():
    assert sorted(eg.__all__) == eg.__all__
    for name in eg.__all__:
        assert getattr(eg, name) is not None
    assert set(eg.__all__) <= set(dir(eg))


def test_no_public_name_is_left_out():
    loaded = {name for name in dir(eg) if not name.startswith("_")}
    modules = {name for name in loaded if f"equigemma.{name}" in sys.modules}
    assert loaded - modules <= set(eg.__all__)


def test_the_version_is_that_of_the_distribution():
    assert eg.__version__ == version("equigemma")


def test_help_shows_the_library():
    shown = pydoc.render_doc(eg, renderer=pydoc.plaintext)
    assert "\n    generate(model" in shown and "\n    class Chat(" in shown


def test_type_checkers_are_told_that_there_are_types():
    assert (files("equigemma") / "py.typed").is_file()
