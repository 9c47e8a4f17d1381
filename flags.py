"""A command line read: what was given, and which flags belong to a mode (`groups`)."""

import argparse

from groups import GROUPS, MODES, UNSET


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (-h explains every flag)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line, checked.

    Raises:
        ValueError: an unknown flag, one that the mode doesn't use, or a value that no run could
            use.
    """
    parser, groups = _parser(_mode(argv))
    args = parser.parse_args(argv, argparse.Namespace(
        **{action.dest: UNSET for action in parser._actions if action.dest != "help"}))
    given = {name for name, value in vars(args).items() if value is not UNSET}
    for name in vars(args).keys() - given:
        setattr(args, name, parser.get_default(name))
    checks = []
    for group, actions, check in groups:
        if args.mode in group.modes:
            checks.append(check)
        for action in actions:
            if action.dest in given and args.mode not in group.modes:
                raise ValueError(f"{action.option_strings[0]}: not for -m {args.mode}, expected "
                                 f"-m {' or -m '.join(group.modes)} beside it")
    if args.stills and not given & {"dataset", "demo"}:
        args.dataset = None
    for check in checks:
        check(args)
    return args


def defaults() -> dict:
    """Of every flag, by its name."""
    parser, _ = _parser()
    return {action.dest: action.default for action in parser._actions}


def _mode(argv: list[str] | None) -> str | None:
    """The mode whose flags `-h` is to show; None: all."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--mode", "-m")
    first.add_argument("--help", "-h", action="store_true")
    try:
        found = first.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        return None
    return found.mode if found.help and found.mode in MODES else None


def _parser(mode: str | None = None):
    """A parser of all groups, or of those of one mode; and each group's actions and check."""
    parser = Parser(description="VideoMatch: matching based video object segmentation.",
                    epilog="Try it with nothing but this folder: python main.py -m eval --demo")
    groups = []
    for group in GROUPS:
        if mode is None or mode in group.modes:
            section = parser.add_argument_group(group.title)
            check = group.flags(section.add_argument)
            groups.append((group, section._group_actions, check))
    return parser, groups
