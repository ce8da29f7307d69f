"""The fields of KubeRay 1.7's ray.io/v1 kinds as JSON Schemas, from its API reference. Pod templates are left to Kubernetes'."""

from typing import Any

Schema = dict[str, Any]

STRING, BOOLEAN, INTEGER, NUMBER = ({"type": t} for t in ("string", "boolean", "integer", "number"))
WORDS: Schema = {"type": "object", "additionalProperties": STRING}
TEMPLATE: Schema = {"type": "object", "required": ["spec"], "properties": {"metadata": {}, "spec": {"type": "object"}}}
TEMPLATE["additionalProperties"] = False
ANY: Schema = {"type": "object"}
LIST: Schema = {"type": "array"}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
NATURAL: Schema = {"type": "integer", "minimum": 0}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object with these fields and no others: a misspelt field would be dropped by the API server without a word."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


AUTH = record(mode=one_of("disabled", "token"), secretName=STRING, enableK8sTokenAuth=BOOLEAN)

AUTOSCALER = record(
    resources=ANY,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    securityContext=ANY,
    idleTimeoutSeconds=INTEGER,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env=LIST,
    envFrom=LIST,
    volumeMounts=LIST,
    command=LIST,
    args=LIST,
)

HEAD = record(
    ("template",),
    template=TEMPLATE,
    headService=ANY,
    enableIngress=BOOLEAN,
    ingressOptions=ANY,
    resources=WORDS,
    labels=WORDS,
    rayStartParams=WORDS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)

WORKERS = record(
    ("groupName", "template"),
    suspend=BOOLEAN,
    groupName=STRING,
    replicas=NATURAL,
    minReplicas=NATURAL,
    maxReplicas=NATURAL,
    idleTimeoutSeconds=INTEGER,
    priority=INTEGER,
    resources=WORDS,
    labels=WORDS,
    rayStartParams=WORDS,
    template=TEMPLATE,
    scaleStrategy=record(workersToDelete=LIST),
    numOfHosts=POSITIVE,
)

CLUSTER_SPEC = record(
    ("headGroupSpec",),
    upgradeStrategy=record(type=one_of("Recreate", "None")),
    authOptions=AUTH,
    suspend=BOOLEAN,
    managedBy=STRING,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=WORDS,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=ANY,
    historyServerOptions=ANY,
    networkPolicy=ANY,
    tlsOptions=record(enabled=BOOLEAN),
    headGroupSpec=HEAD,
    rayVersion=STRING,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)

JOB_SPEC = record(
    ("entrypoint",),
    activeDeadlineSeconds=POSITIVE,
    backoffLimit=NATURAL,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=TEMPLATE,
    metadata=WORDS,
    clusterSelector=WORDS,
    submitterConfig=record(backoffLimit=NATURAL),
    managedBy=STRING,
    deletionStrategy=ANY,
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=STRING,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=NATURAL,
    preRunningDeadlineSeconds=POSITIVE,
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
)


def kind(name: str, spec: Schema) -> Schema:
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": name}, "metadata": ANY}
    return record(("apiVersion", "kind", "metadata", "spec"), **head, spec=spec)


RAY_JOB = kind("RayJob", JOB_SPEC)
RAY_CLUSTER = kind("RayCluster", CLUSTER_SPEC)
