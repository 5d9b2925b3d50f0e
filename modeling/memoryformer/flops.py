"""Operations of a block of MemoryFormer, counted as in the paper: a multiplication with its addition is one operation."""

from .configuration_memoryformer import MemoryFormerConfig


def block_flops(config: MemoryFormerConfig, sequence_length: int) -> dict[str, int]:
    """Operations of one block on one sequence.

    Returns:
        `attention`: `2 s^2 d` of scores and weighted sums, in a standard block too. `memory_layers`: the sums of rows of all
        five memory layers. `hashes`: their hashes; queries, keys and values share one. `memory_layers_in_paper`: the paper's
        formula for them, `6 K s d`, which takes both layers of the feed-forward block for wider than they are.
        `standard_layers`: `12 s d^2`, the matrices of a standard block.
    """
    width, tables = config.hidden_size, config.num_tables
    projections = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    return {
        "attention": 2 * sequence_length**2 * width,
        "memory_layers": sequence_length * tables * (projections + config.intermediate_size + width),
        "hashes": sequence_length * (2 * width + config.intermediate_size),
        "memory_layers_in_paper": 6 * tables * sequence_length * width,
        "standard_layers": 12 * sequence_length * width**2,
    }
