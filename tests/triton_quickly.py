"""Triton's interpreter in less time, for the tests that run it."""

from typing import Any

from triton.runtime import interpreter


def once_a_launch() -> None:
    """Wherever a function of a kernel is called, the interpreter looks through the language for what to replace, a third of all its time.
    Here it does so once a launch for the functions of a module."""
    launched = interpreter.GridExecutor.__call__
    seen: set[int] = set()

    def launch(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        seen.clear()
        launched(self, *args, **kwargs)

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in seen:
            seen.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch, call
