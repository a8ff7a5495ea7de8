"""Who may use what, and how much: callers and their keys, the policies of adapters, rates and quotas."""
