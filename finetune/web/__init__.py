"""The page of ``finetune ui``: the commands in a browser, as child processes that outlive it."""
