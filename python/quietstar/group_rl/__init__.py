"""Group RL over shared prompts: many completions of a prompt in one forward. It knows no config and no thoughts.

A batch of completions goes down through these files: ``shared_prompt`` (a TRL trainer hands it over), ``completions`` (prompts
once, completions as branches, one forward), the kernels' attention. ``shared_logprobs`` is the same for a loop of one's own;
``prompts_once`` generates; ``likelihood_reward`` rewards.
"""
