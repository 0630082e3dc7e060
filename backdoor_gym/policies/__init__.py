"""The contract of a policy, and the registry of those that ship."""
