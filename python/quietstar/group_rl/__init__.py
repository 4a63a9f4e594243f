"""Group RL over shared prompts: many completions of a prompt in one forward. It knows no config and no thoughts.

``SharedPrompts`` overrides the method of TRL's trainers that computes log-probabilities. It calls ``completions.end_logprobs``,
which builds the tree of the sequences (``ThoughtLayout.from_sequences``), runs the decoder once and scores the tokens of the
completions from its hidden states. ``shared_logprobs`` does the same in a loop of your own. ``prompts_once`` generates for the
recipes, ``likelihood_reward`` is a reward function, and ``tree_packing`` serves trees that AsyncGRPO makes itself. What the
kernels call a branch, or a thought, is here a completion.
"""
