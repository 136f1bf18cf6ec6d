/** What a figure is counted in. */
export type Unit = "/s" | "ms" | "us" | "MB" | "%" | "x" | "B";

/** A bound on the ratio to the floor, or on the figure itself if there is no ratio or the goal says so. */
export interface Goal {
  bound: ">=" | "<=";
  value: number;
  of?: "figure";
}

/** One line of the table; without a figure it could not be measured. */
export interface Row {
  operation: string;
  unit?: Unit;
  floor?: number;
  figure?: number;
  /** Median of the ratios of the rounds, which is not quite the ratio of the medians. */
  ratio?: number;
  goal?: Goal;
  note?: string;
}

// What two runs may differ by without a reason.
const NOISE = 0.15;

/** Whether a row reaches its goal; near: not quite, by no more than noise explains. */
export type Verdict = "ok" | "near" | "short";

const COLUMNS = ["operation", "floor", "figure", "ratio", "goal", "", "note"] as const;

function digits(value: number): string {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

function quantity(value: number | undefined, unit: Unit | undefined): string {
  if (value === undefined || unit === undefined) return "";
  if (unit === "/s" && value >= 10_000) return `${digits(value / 1000)}k/s`;
  return unit === "x" || unit === "%" ? `${digits(value)}${unit}` : `${digits(value)} ${unit}`.replace(" /s", "/s");
}

const isAbsolute = ({ goal, ratio }: Row): boolean => goal?.of === "figure" || ratio === undefined;

function goalText(row: Row): string {
  const { goal, unit } = row;
  return goal ? `${goal.bound} ${isAbsolute(row) ? quantity(goal.value, unit) : digits(goal.value)}` : "";
}

/** Undefined for a row without a goal. */
export function verdict(row: Row): Verdict | undefined {
  const { goal, ratio, figure } = row;
  if (!goal) return undefined;
  const value = (isAbsolute(row) ? figure : ratio) ?? Number.NaN;
  const reaches = (slack: number) =>
    goal.bound === ">=" ? value >= goal.value * (1 - slack) : value <= goal.value * (1 + slack);
  if (reaches(0)) return "ok";
  return reaches(NOISE) ? "near" : "short";
}

function cells(row: Row): string[] {
  return [
    row.operation,
    quantity(row.floor, row.unit),
    quantity(row.figure, row.unit),
    row.ratio === undefined ? "" : digits(row.ratio),
    goalText(row),
    verdict(row) ?? "",
    row.note ?? "",
  ];
}

/** The rows as a Markdown table that also reads well in a terminal. */
export function table(rows: readonly Row[]): string {
  const lines = [[...COLUMNS] as string[], ...rows.map(cells)];
  const widths = COLUMNS.map((_column, index) => Math.max(...lines.map((line) => line[index]?.length ?? 0)));
  const isText = (index: number) => index === 0 || index >= 4;
  const line = (values: readonly string[]) =>
    `| ${values.map((value, index) => (isText(index) ? value.padEnd(widths[index] ?? 0) : value.padStart(widths[index] ?? 0))).join(" | ")} |`;
  const rule = `|${widths.map((width, index) => (isText(index) ? `:${"-".repeat(width + 1)}` : `${"-".repeat(width + 1)}:`)).join("|")}|`;
  const [head = [], ...body] = lines;
  return [line(head), rule, ...body.map(line)].join("\n");
}

/** What to say below the table about the rows that miss their goal. */
export function shortfalls(rows: readonly Row[]): string {
  const withGoal = rows.filter(({ goal }) => goal);
  const missed = withGoal.filter((row) => verdict(row) !== "ok");
  if (!missed.length) return "Nothing falls short.";
  const reached = (row: Row) =>
    isAbsolute(row) ? quantity(row.figure, row.unit) : `${digits(row.ratio ?? Number.NaN)} of the floor`;
  const line = (row: Row) =>
    `  ${row.operation}: ${reached(row)}, goal ${goalText(row)}${verdict(row) === "near" ? " (within noise)" : ""}`;
  return [`${missed.length} of ${withGoal.length} goals missed:`, ...missed.map(line)].join("\n");
}
