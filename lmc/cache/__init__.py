"""The cache: keys, directory, policies, transfers, tiers, and the engines' connectors.

Kept empty on purpose: the simulator imports lmc.cache.policy and must not pull in torch.
"""
