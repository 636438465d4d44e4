"""A cluster of mock engines whose counts follow what standard input says.

    python -m tests.integration.counts_process CONFIG

Each line is one of these, answered by one line on standard output:

    ask SHAPE NUMBER        through the planner's scaler
    wanted                  what Serve works towards
    lose                    the board between the scaler and Serve
    status                  Serve's status of the application
    apply CONFIG            another configuration, in place
"""

from __future__ import annotations

import asyncio
import json
import sys

ANSWER = "answer: "


async def main() -> None:
    import ray

    from core.errors import ScalingError
    from deploy.cluster import Cluster
    from deploy.config import load_config
    from deploy.planner_settings import planned_shape
    from deploy.settings import APP_NAME, COUNT_BOARD_NAME
    from planner.count_board import NAMESPACE
    from planner.serve_scaler import ServeScaler

    config = load_config(sys.argv[1])
    cluster = await asyncio.to_thread(
        Cluster(config, progress=lambda text: print(text, flush=True)).__enter__
    )
    try:
        (model,) = config.models
        scaler = ServeScaler(
            [planned_shape(shape) for shape in model.shapes],
            board=COUNT_BOARD_NAME,
            gpu_budget=config.planner.gpu_budget,
            timeout_s=10,
        )
        print(ANSWER, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            answer: object = None
            try:
                match line.split():
                    case ["ask", shape, number]:
                        await scaler.ask(shape, int(number))
                    case ["wanted"]:
                        answer = await scaler.wanted()
                    case ["lose"]:
                        ray.kill(ray.get_actor(COUNT_BOARD_NAME, namespace=NAMESPACE))
                    case ["status"]:
                        from ray import serve  # once it is known whether there is HAProxy

                        answer = (await asyncio.to_thread(serve.status)).applications[APP_NAME].status
                    case ["apply", path]:
                        await asyncio.to_thread(cluster.update, load_config(path))
            except (ValueError, ScalingError) as error:
                answer = str(error)
            print(f"{ANSWER}{json.dumps(answer)}", flush=True)
    finally:
        await asyncio.to_thread(cluster.stop)


if __name__ == "__main__":
    asyncio.run(main())
