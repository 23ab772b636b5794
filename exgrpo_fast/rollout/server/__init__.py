"""Rollouts by vLLM servers in processes of their own."""
