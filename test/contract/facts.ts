import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fromJson, isFieldSet, type JsonObject, protoInt64, toJson } from "@bufbuild/protobuf";
