"""Serve's request router for the detectors: `serving.routing`, with what Serve knows of the replicas.

Serve pickles this module by value into the deployment, and runs it where a handle is used: in workers and the API.
"""

import random

from ray.serve.request_router import LocalityMixin, PendingRequest, RequestRouter, RunningReplica

from serving import routing


class CategoryRouter(LocalityMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Prefers a replica on the caller's node; where the categories do not fit into one replica, their first one.

    A replica with more than its share of the calls is passed over. (Serve's own `_prefer_local_routing` passes a local
    one over only when it is full: a node with many workers would leave the detectors of the others idle.)
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in the replicas that there are; Serve calls this whenever they or their reports change."""
        super().update_replicas(replicas)
        fit = all(replica.routing_stats.get(routing.CATEGORIES_FIT, True) for replica in replicas)
        ids = frozenset(replica.replica_id.unique_id for replica in replicas)
        routing.set_placement(self._deployment_id.name, routing.Placement(ids, fit))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which the call is to be tried, each a rank of its own."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # Serve would try again at once, for ever
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = self.replica_queue_len_cache
        calls = {name: known.get(replica.replica_id) or 0 for name, replica in by_id.items()}
        categories = _categories(pending_request)
        if categories and not routing.placement_of(self._deployment_id.name).categories_fit:
            ranking = routing.replicas_of(categories[0], list(by_id))
            order = routing.choose(ranking, calls, routing.MOST_OF_MEAN_WITH_MODELS)
        else:
            order = routing.choose(self._by_distance(candidate_replicas), calls)
        return [[by_id[name]] for name in order]

    def _by_distance(self, replicas: list[RunningReplica]) -> list[str]:
        """Return the replicas with those on the caller's node first, in a random order within each distance."""
        shuffled = random.sample(replicas, len(replicas))
        return [replica.replica_id.unique_id for rank in self.rank_replicas_via_locality(shuffled) for replica in rank]


def _categories(request: PendingRequest | None) -> list[str]:
    """Return the categories of a call of `detect(images, categories, depths)`, which all go to one replica."""
    if request is None or request.metadata.call_method != "detect":
        return []
    _, categories, _ = request.args
    return list(categories)
