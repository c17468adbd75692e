"""Where rollouts come from besides the policy itself."""
