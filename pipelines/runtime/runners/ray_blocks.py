"""Keep the blocks of a Ray dataset as they are cut: Ray would join and cut them by bytes."""

from typing import Any

_KEEP = "facepipe_keep_blocks"


def keep_blocks(context: Any) -> None:
    """Have datasets of a context keep the blocks that their operators put out.

    Blocks shrink towards the end of a run, so that all workers finish together, and hold as many pixels as memory
    allows. The result does not depend on it: it stays the same if Ray cuts the blocks otherwise.

    Args:
        context: the DataContext.
    """
    # This is no public part of Ray. A version that has it elsewhere cuts blocks as it likes.
    try:
        from ray.data._internal.logical.optimizers import get_physical_ruleset

        rules = get_physical_ruleset()
        rule = _make_rule()
    except (ImportError, AttributeError):
        return
    if not any(known.__name__ == rule.__name__ for known in rules):
        rules.add(rule)
    context.set_config(_KEEP, True)


def _make_rule() -> type:
    """Make a rule for Ray's optimizer, which runs after the plan of operators is complete."""
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.logical.interfaces import Rule
    from ray.data._internal.logical.rules import FuseOperators, InheritTargetMaxBlockSizeRule
    from ray.data._internal.output_buffer import OutputBlockSizeOption

    class KeepBlocks(Rule):
        """Switch the shaping of blocks off in each operator."""

        @classmethod
        def dependencies(cls) -> list[type]:
            """Return the rules that come before: those that make operators, or set sizes of their blocks."""
            return [FuseOperators, InheritTargetMaxBlockSizeRule]

        def apply(self, plan: Any) -> Any:
            """Change the plan, if its context says so."""
            if plan.context.get_config(_KEEP, False):
                for operator in plan.dag.post_order_iter():
                    if isinstance(operator, MapOperator):
                        for function in operator.get_map_transformer().get_transform_fns():
                            function._output_block_size_option = OutputBlockSizeOption(disable_block_shaping=True)
            return plan

    return KeepBlocks
