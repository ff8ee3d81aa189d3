"""The OpenAPI document, from the same forms that bodies are read and written by."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from pydantic import BaseModel, RootModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from guard.service.http.endpoint import Endpoint
from guard.service.http.forms import Form

_Schema = dict[str, Any]
_PLACE = "#/components/schemas/"
_SCALARS: Mapping[int, _Schema] = {
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer"},
    FieldDescriptor.CPPTYPE_INT64: {"type": "string", "format": "int64"},  # longer than the numbers of JSON
}


class Document(RootModel[dict[str, Any]]):
    """A document of OpenAPI 3.1."""


def document(endpoints: Sequence[Endpoint], pages: Mapping[str, str]) -> Document:
    """Of endpoints, and of `pages` that are open to all, each with what it shows."""
    schemas = _Schemas(endpoints)
    paths: dict[str, _Schema] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    for path, shown in pages.items():
        paths[path] = {"get": {"summary": shown, "security": [], "responses": {"200": {"description": shown}}}}
    return Document(
        {
            "openapi": "3.1.0",
            "info": {"title": "Guard", "version": version("guard-moderation")},
            "security": [{"token": []}, {}],  # where the server knows tokens, and where it knows none
            "paths": paths,
            "components": {
                "schemas": schemas.found,
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


class _Schemas:
    """The schemas of all that the endpoints take and answer, and references to them."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        models: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {}
        self.found: dict[str, _Schema] = {}
        for endpoint in endpoints:
            for form, mode in _forms(endpoint):
                if issubclass(form, BaseModel):
                    models[form, mode] = None
                else:
                    self._add(_described(form))
        self._models, schema = models_json_schema(list(models), ref_template=f"{_PLACE}{{model}}")
        self.found |= schema["$defs"]

    def of(self, form: Form, mode: JsonSchemaMode) -> _Schema:
        return self._models[form, mode] if issubclass(form, BaseModel) else _reference(_described(form))

    def _add(self, descriptor: Descriptor) -> None:
        """The message, and all that it holds."""
        if descriptor.full_name in self.found:
            return
        schema: _Schema = {"type": "object", "properties": {}}
        self.found[descriptor.full_name] = schema
        for field in descriptor.fields:
            schema["properties"][field.json_name] = self._field(field)

    def _field(self, field: FieldDescriptor) -> _Schema:
        held = field.message_type
        if held is not None and held.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": self._field(held.fields_by_name["value"])}
        if held is not None:
            self._add(held)
            schema = _reference(held)
        elif field.enum_type is not None:
            schema = {"enum": [value.name for value in field.enum_type.values]}
        else:
            schema = _SCALARS[field.cpp_type]
        return {"type": "array", "items": schema} if field.is_repeated else schema


def _described(form: type[Message]) -> Descriptor:
    return cast(Descriptor, form.DESCRIPTOR)  # its types know two implementations


def _reference(descriptor: Descriptor) -> _Schema:
    return {"$ref": f"{_PLACE}{descriptor.full_name}"}


def _forms(endpoint: Endpoint) -> Iterator[tuple[Form, JsonSchemaMode]]:
    for form in endpoint.takes:
        yield form, "validation"
    yield endpoint.answer, "serialization"
    yield endpoint.errors.form, "serialization"


def _operation(endpoint: Endpoint, schemas: _Schemas) -> _Schema:
    named = [{"name": name, "in": "path"} for name in re.findall(r"{(\w+)}", endpoint.path)]
    named += [{"name": endpoint.header, "in": "header"}] if endpoint.header else []
    operation: _Schema = {
        "summary": endpoint.summary,
        "parameters": [{**one, "required": True, "schema": {"type": "string"}} for one in named],
        "responses": {
            "200": {"description": "The answer"} | _json(schemas.of(endpoint.answer, "serialization")),
            "default": {"description": "What went wrong"} | _json(schemas.of(endpoint.errors.form, "serialization")),
        },
    }
    if endpoint.takes:
        taken = [schemas.of(form, "validation") for form in endpoint.takes]
        operation["requestBody"] = {"required": True} | _json(taken[0] if len(taken) == 1 else {"allOf": taken})
    return operation


def _json(schema: _Schema) -> _Schema:
    return {"content": {"application/json": {"schema": schema}}}
