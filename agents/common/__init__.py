"""What all agents share: the policy's interface, and answering a task with a policy."""
