import { create, toJson } from "@bufbuild/protobuf";
import { createValidator } from "@bufbuild/protovalidate";
import { describe, expect, test } from "vitest";
import { AutomationsFileSchema } from "../gen/gitpod/v1/environment_automation_pb.js";
import { faultText, fileWarnings, parseAutomationsFile } from "../src/domain/automations-file.ts";

const EXAMPLE = `
services:
  db:                                   # key = reference
    name: Database
    description: Local Postgres
    role: default
    triggeredBy: [postEnvironmentStart]
    commands: { start: ./db.sh, ready: pg_isready, stop: ./db-stop.sh }
    readinessTimeout: 90s
    runsOn: { machine: {} }
  cache:
    name: Cache
    commands:
      start: |
        redis-server --save ""
        echo over
    runsOn:
      docker:
        image: "redis:7"
        environment: ["A=1", B]
tasks:
  deps:
    name: Install
    command: npm ci
    triggeredBy: [prebuild, postDevcontainerStart]
    prebuildRequiresSuccess: true
  test:
    name: Tests
    command: npm test
    dependsOn: [deps, db]
`;

const parsed = (text: string) => {
  const { file, fault } = parseAutomationsFile(text);
  if (fault) throw new Error(faultText(fault));
  return file;
};

const faultOf = (text: string) => {
  const { fault } = parseAutomationsFile(text);
  if (!fault) throw new Error("nothing is wrong with it");
  return fault;
};

/** A file with one service, or one task, that has these further lines. */
const service = (...lines: string[]) =>
  `services:\n  web:\n    name: Web\n${lines.map((line) => `    ${line}\n`).join("")}`;
const task = (...lines: string[]) =>
  `tasks:\n  t:\n    name: T\n    command: c\n${lines.map((line) => `    ${line}\n`).join("")}`;

describe("files that can be applied", () => {
  test("the example of the documentation means what it says", () => {
    expect(toJson(AutomationsFileSchema, parsed(EXAMPLE))).toEqual({
      services: {
        db: {
          name: "Database",
          description: "Local Postgres",
          role: "default",
          triggeredBy: ["postEnvironmentStart"],
          commands: { start: "./db.sh", ready: "pg_isready", stop: "./db-stop.sh" },
          readinessTimeout: "90s",
          runsOn: { machine: {} },
        },
        cache: {
          name: "Cache",
          commands: { start: 'redis-server --save ""\necho over\n' },
          runsOn: { docker: { image: "redis:7", environment: ["A=1", "B"] } },
        },
      },
      tasks: {
        deps: {
          name: "Install",
          command: "npm ci",
          triggeredBy: ["prebuild", "postDevcontainerStart"],
          prebuildRequiresSuccess: true,
        },
        test: { name: "Tests", command: "npm test", dependsOn: ["deps", "db"] },
      },
    });
  });

  test("JSON, and the names of the schema, are read as well", () => {
    const json = JSON.stringify(toJson(AutomationsFileSchema, parsed(EXAMPLE)), undefined, "\t");
    expect(parsed(json)).toEqual(parsed(EXAMPLE));
    expect(parsed(JSON.stringify(JSON.parse(json)))).toEqual(parsed(EXAMPLE));
    const snake = EXAMPLE.replace(/[a-z][A-Z](?=[a-zA-Z]*:)/g, ([lower, upper]) => `${lower}_${upper?.toLowerCase()}`);
    expect(snake).toContain("prebuild_requires_success");
    expect(parsed(snake)).toEqual(parsed(EXAMPLE));
  });

  test.each(["", "\n\n", "# nothing\n", "---\n", "{}", "services:\n", "services: {}\ntasks: null\n", "\ufeff{}"])(
    "an empty one, written %j",
    (text) => expect(parsed(text)).toEqual(create(AutomationsFileSchema)),
  );

  test("references may look like anything, and what is left empty is not there", () => {
    const { services, tasks } = parsed(
      "services:\n  1: {name: One, description: , readinessTimeout: ~}\n  true: {name: 'Yes'}\n  constructor: {name: C}\ntasks: {}\n",
    );
    expect(Object.keys(services).sort()).toEqual(["1", "constructor", "true"]);
    expect(services["1"]).toMatchObject({ name: "One", description: "" });
    expect(tasks).toEqual({});
  });

  test("anchors stand for what was defined last before them, within bounds", () => {
    const text = `services:
  a: &base
    name: &name Base
    commands: &commands { start: run }
  b: *base
  c: { name: *name, commands: *commands }
  d: { name: &name Other, description: *name }
  e: { name: *name }
`;
    const { services } = parsed(text);
    expect(services.b).toEqual(services.a);
    expect([services.c?.name, services.c?.commands?.start]).toEqual(["Base", "run"]);
    expect([services.d?.description, services.e?.name]).toEqual(["Other", "Other"]);
  });
});

describe("mistakes", () => {
  test("AUT-29 an unknown field is named with its line and its path", () => {
    expect(faultOf(service("commands:", "  start: x", "  begin: y"))).toEqual({
      line: 6,
      path: "services.web.commands.begin",
      message: "is not a known field; there are start, ready, stop",
    });
    expect(faultText(faultOf("services: {}\njobs: {}\n"))).toBe(
      "line 2: jobs is not a known field; there are services, tasks",
    );
  });

  test.each([
    [service("dependsOn: [db]"), 4, "services.web.dependsOn", /only tasks can depend/],
    [service("depends_on: [db]"), 4, "services.web.depends_on", /only tasks can depend/],
    [service("command: x"), 4, "services.web.command", /commands\.start/],
    [service("env: {A: 1}"), 4, "services.web.env", /secrets, or runsOn\.docker\.environment/],
    [task("env: [A]"), 5, "tasks.t.env", /secrets, or runsOn/],
    [service("runsOn: {docker: {image: x, env: []}}"), 4, "services.web.runsOn.docker.env", /secrets/],
    [service("runsOn: machine"), 4, "services.web.runsOn", /\{ machine: \{\} \}/],
    [service("runsOn: {machine: {}, docker: {image: x}}"), 4, "services.web.runsOn.docker", /combined/],
    [service("runsOn: {docker: {}}"), 4, "services.web.runsOn.docker.image", /required/],
    [service("readinessTimeout: 2m"), 4, "services.web.readinessTimeout", /"90s"/],
    [service("readinessTimeout: -1s"), 4, "services.web.readinessTimeout", /"90s"/],
    [service("readinessTimeout: 90"), 4, "services.web.readinessTimeout", /text/],
    [service("readinessTimeout: 86400.5s"), 4, "services.web.readinessTimeout", /at most 86400s/],
    [service("triggeredBy: [manual, postMachineStart]"), 4, "services.web.triggeredBy[1]", /through the API/],
    [service("triggeredBy:", "  - manual", "  - beforeSnapshot"), 6, "services.web.triggeredBy[1]", /through the API/],
    [service("triggeredBy: [always]"), 4, "services.web.triggeredBy[0]", /one of manual/],
    [service("triggeredBy: manual"), 4, "services.web.triggeredBy", /list/],
    [service("triggeredBy: [~]"), 4, "services.web.triggeredBy[0]", /text/],
    [service("role: security-agent"), 4, "services.web.role", /through the API/],
    [service("role: database"), 4, "services.web.role", /ai-agent/],
    [service("commands: {}"), 4, "services.web.commands.start", /required/],
    [service("commands: run"), 4, "services.web.commands", /mapping/],
    [service("description: 5"), 4, "services.web.description", /quotes/],
    [service("description: [a]"), 4, "services.web.description", /text/],
    [task("prebuildRequiresSuccess: yes"), 5, "tasks.t.prebuildRequiresSuccess", /true or false/],
    ["tasks:\n  t:\n    name: T\n", 3, "tasks.t.command", /required/],
    ["tasks:\n  t:\n    name: T\n    command: ''\n", 3, "tasks.t.command", /required/],
    ["services:\n  web:\n    description: x\n", 3, "services.web.name", /required/],
    ["services:\n  web:\n", 2, "services.web", /mapping/],
    ["services:\n  we b: {name: x}\n", 2, "services.we b", /reference/],
    ["services:\n  __proto__: {name: x}\n", 2, "services.__proto__", /reference/],
    [`services:\n  ${"x".repeat(129)}: {name: x}\n`, 2, `services.${"x".repeat(129)}`, /reference/],
    ["services:\n  ? [a]\n  : {name: x}\n", 2, "services", /key/],
    ["services: []\n", 1, "services", /mapping/],
    ["- a\n", 1, "", /mapping/],
    ["just words\n", 1, "", /mapping/],
    ["services: {}\nservices: {}\n", 2, "services", /given twice/],
    ["services: {}\ntasks:\n  a: {name: A, command: a}\n  a: {name: A, command: a}\n", 4, "tasks.a", /given twice/],
    [service("name: Again"), 4, "services.web.name", /given twice/],
    [service("triggeredBy: []", "triggered_by: []"), 5, "services.web.triggered_by", /given twice/],
    [service("description:", "description: x"), 5, "services.web.description", /given twice/],
    [service("<<: {role: editor}"), 4, "services.web.<<", /merging/],
    [service("description: *nothing"), 4, "services.web.description", /not defined before/],
    ["services: &s\n  web:\n    name: x\n    commands: *s\n", 4, "services.web.commands", /part of/],
    ["services: {}\n---\ntasks: {}\n", 2, "", /not valid/],
    ["services:\n\tweb: {}\n", 2, "", /not valid/],
    ["services: {web: {name: x}\n", 2, "", /not valid/],
    [service("description: !secret x"), 4, "", /not valid/],
    [service('description: "\\q"'), 4, "", /escape/],
  ])("%j is refused", (text, line, path, message) => {
    expect(faultOf(text)).toEqual({ line, path, message: expect.stringMatching(message) });
  });

  test("what is accepted satisfies every rule of the schema", () => {
    const validator = createValidator();
    const values: Record<string, string[]> = {
      name: ["x", "''"],
      role: ["''", "default", "editor", "ai-agent", "security-agent"],
      triggeredBy: ["[]", "[manual, prebuild]", "[postMachineStart]"],
      readinessTimeout: ["0s", "0.5s", "86400s", "86401s", "1h"],
      runsOn: ["{}", "{machine: {}}", "{docker: {image: ''}}", "{docker: {image: x}}"],
      commands: ["{start: x}", "{start: ''}", "{ready: x}"],
    };
    let accepted = 0;
    for (const [field, texts] of Object.entries(values)) {
      for (const text of texts) {
        const name = field === "name" ? "" : "name: W, ";
        const { file } = parseAutomationsFile(`services: {web: {${name}${field}: ${text}}}`);
        if (!file) continue;
        accepted += 1;
        expect(validator.validate(AutomationsFileSchema, file).kind, `${field}: ${text}`).toBe("valid");
      }
    }
    expect(accepted).toBe(14);
  });
});

describe("hostile texts", () => {
  const MIB = 1024 * 1024;
  const bomb = (levels: number, fan: number) => {
    const lines = ["services:", "  s:", "    name: S", `    triggeredBy: &a0 [${"manual,".repeat(fan)}]`];
    for (let level = 1; level < levels; level++) {
      lines.push(`  s${level}:`, "    name: S", `    triggeredBy: *a0`);
    }
    return lines.join("\n");
  };

  test("one that is too large, or becomes so by its anchors, is refused", () => {
    expect(faultOf(`# ${"x".repeat(MIB)}`).message).toContain(`${MIB} bytes`);
    expect(faultOf(bomb(400, 500)).message).toContain("once its anchors are expanded");
    // Each level holds the one before ten times over: no such structure fits into a file of this form.
    const laughs = Array.from(
      { length: 12 },
      (_, level) => `l${level}: &l${level} [${`*l${level - 1},`.repeat(level ? 10 : 0)}x]`,
    );
    expect(faultOf(laughs.join("\n")).message).toContain("not a known field");
  });

  test.each([
    ["brackets", "[".repeat(MIB)],
    ["mappings in mappings", "{a: ".repeat(MIB / 4)],
    ["dashes", "- ".repeat(MIB / 2)],
    ["question marks", "? ".repeat(MIB / 2)],
    ["keys", Array.from({ length: 120_000 }, (_, index) => `k${index}:`).join("\n")],
    ["references", `services:\n${Array.from({ length: 50_000 }, (_, index) => `  k${index}:`).join("\n")}`],
    ["aliases", `services: &a {}\ntasks: [${"*a,".repeat(300_000)}]`],
    ["closing brackets", "]".repeat(MIB)],
    ["directives", "%x\n".repeat(MIB / 3)],
    ["escapes", `a: "${"\\q".repeat(MIB / 3)}"`],
    ["indentation", Array.from({ length: 1400 }, (_, depth) => `${" ".repeat(depth)}a:`).join("\n")],
    ["documents", "---\n".repeat(MIB / 4)],
  ])("%s by the million are refused soon", (_what, text) => {
    const before = performance.now();
    expect(faultOf(text).line).toBeGreaterThan(0);
    expect(performance.now() - before).toBeLessThan(5_000);
  });

  test("a large file of an honest kind is read", () => {
    const script = "    echo one more line of a script that somebody has written\n".repeat(900);
    const text = `tasks:\n${Array.from({ length: 16 }, (_, index) => `  t${index}:\n   name: T\n   command: |\n${script}`).join("")}`;
    expect(text.length).toBeGreaterThan(800_000);
    expect(Object.keys(parsed(text).tasks)).toHaveLength(16);
  });
});

describe("warnings", () => {
  test("AUT-33 a file in which nothing has a trigger says so, and a service that cannot be started is named", () => {
    expect(fileWarnings(parsed(EXAMPLE))).toEqual([]);
    expect(fileWarnings(parsed(""))).toEqual([]);
    expect(fileWarnings(parsed(task()))).toEqual([expect.stringContaining("trigger")]);
    expect(fileWarnings(parsed(task("triggeredBy: [manual]")))).toEqual([]);
    expect(fileWarnings(parsed(service("triggeredBy: [manual]")))).toEqual([
      expect.stringContaining("service web has no start command"),
    ]);
  });
});
