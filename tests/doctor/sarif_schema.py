"""What SARIF 2.1.0 asks of the objects that the doctor writes, as a JSON schema.

Written from the text of the standard (OASIS, SARIF Version 2.1.0 Plus Errata 01, sections 3.4 to 3.58), for the objects
that are used here and stricter than it: a property that is not listed is refused, though the standard may have it.
"""

TEXT = {"type": "string", "minLength": 1}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
# 3.4.3: a URI reference; relative ones have no scheme and no backslash, and no space (RFC 3986).
URI = {"type": "string", "pattern": r"^(file:///[^\s\\]+|(?!/)[^\s\\:]+)$"}


def closed(required, **properties):
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


def array(items, **options):
    return {"type": "array", "items": items, **options}


# 3.11.8: plain text is required wherever Markdown is there.
MESSAGE = closed(["text"], text=TEXT, markdown=TEXT)
PROPERTIES = {"type": "object"}  # 3.8: a property bag holds anything

# 3.49 reportingDescriptor; 3.49.3: the id; 3.12: multiformatMessageString.
RULE = closed(
    ["id"],
    id=TEXT,
    name=TEXT,
    shortDescription=MESSAGE,
    fullDescription=MESSAGE,
    help=MESSAGE,
    properties=PROPERTIES,
)
# 3.29 physicalLocation; 3.30.5: startLine is at least 1.
PHYSICAL = closed(
    ["artifactLocation"],
    artifactLocation=closed(["uri"], uri=URI),
    region=closed(["startLine"], startLine={"type": "integer", "minimum": 1}),
)
# 3.33 logicalLocation.
LOGICAL = closed([], name=TEXT, fullyQualifiedName=TEXT, kind=TEXT)
LOCATION = closed([], physicalLocation=PHYSICAL, logicalLocations=array(LOGICAL, minItems=1))
# 3.35 suppression: the kind is required; without a status it is accepted.
SUPPRESSION = closed(
    ["kind"],
    kind={"enum": ["inSource", "external"]},
    justification=TEXT,
)
# 3.27 result: only the message is required; a ruleId is what makes it one of ours.
RESULT = closed(
    ["ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"],
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": 0},
    level=LEVEL,
    message=MESSAGE,
    locations=array(LOCATION),
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
    suppressions=array(SUPPRESSION, minItems=1),
    properties=PROPERTIES,
)
# 3.58 notification; 3.52 reportingDescriptorReference.
NOTIFICATION = closed(
    ["message"],
    message=MESSAGE,
    level=LEVEL,
    associatedRule=closed(["id"], id=TEXT, index={"type": "integer", "minimum": 0}),
)
# 3.20 invocation: whether it succeeded is required.
INVOCATION = closed(
    ["executionSuccessful"],
    executionSuccessful={"type": "boolean"},
    toolExecutionNotifications=array(NOTIFICATION),
)
# 3.19 toolComponent; 3.14 run: the tool is required, and results unless nothing was looked for.
DRIVER = closed(["name", "rules"], name=TEXT, version=TEXT, rules=array(RULE, uniqueItems=True))
RUN = closed(
    ["tool", "results"],
    tool=closed(["driver"], driver=DRIVER),
    invocations=array(INVOCATION),
    results=array(RESULT),
    properties=PROPERTIES,
)
LOG = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **closed(
        ["version", "runs"],
        **{"$schema": {"type": "string", "format": "uri"}},
        version={"const": "2.1.0"},
        runs=array(RUN, minItems=1, maxItems=1),
    ),
}


def faults(log):
    """What the schema cannot say: rules have distinct ids (3.19.23), and indices point at the rule that is named."""
    (run,) = log["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    if len(set(ids)) != len(ids):
        yield "two rules have one id"
    for result in run["results"]:
        if ids[result["ruleIndex"]] != result["ruleId"]:
            yield f"{result['ruleId']} points at {ids[result['ruleIndex']]}"
    for invocation in run.get("invocations", ()):
        for note in invocation.get("toolExecutionNotifications", ()):
            rule = note.get("associatedRule")
            if rule and ids[rule["index"]] != rule["id"]:
                yield f"a notification about {rule['id']} points at {ids[rule['index']]}"
