"""Rollouts by vLLM servers in other processes."""
