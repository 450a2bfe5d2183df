"""The fields of a RayCluster by the API reference of KubeRay 1.5, for manifests that are written by hand.

Pod templates are Kubernetes' own: its OpenAPI schema has them.
"""

from typing import Any

_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_BOOLEAN = {"type": "boolean"}
_TEMPLATE = {"type": "object", "required": ["spec"]}


def _fields(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_HEAD = _fields(
    ("rayStartParams", "template"),
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService={"type": "object"},
    enableIngress=_BOOLEAN,
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
)
_WORKERS = _fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName={"type": "string", "minLength": 1},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts=_COUNT,
    suspend=_BOOLEAN,
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
    scaleStrategy={"type": "object"},
)
_SPEC = _fields(
    ("headGroupSpec",),
    authOptions=_fields((), mode={"enum": ["disabled", "token"]}, enableK8sTokenAuth=_BOOLEAN),
    rayVersion={"type": "string"},
    enableInTreeAutoscaling=_BOOLEAN,
    autoscalerOptions={"type": "object"},
    gcsFaultToleranceOptions={"type": "object"},
    headServiceAnnotations=_TEXTS,
    managedBy={"type": "string"},
    suspend=_BOOLEAN,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
RAY_CLUSTER = _fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata={"type": "object", "required": ["name"]},
    spec=_SPEC,
)
