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

/** Whether a row reaches its goal; undefined if it has none. */
export function reaches(row: Row): boolean | undefined {
  const { goal, ratio, figure } = row;
  if (!goal) return undefined;
  const value = (isAbsolute(row) ? figure : ratio) ?? Number.NaN;
  return goal.bound === ">=" ? value >= goal.value : value <= goal.value;
}

function cells(row: Row): string[] {
  const reached = reaches(row);
  return [
    row.operation,
    quantity(row.floor, row.unit),
    quantity(row.figure, row.unit),
    row.ratio === undefined ? "" : digits(row.ratio),
    goalText(row),
    reached === undefined ? "" : reached ? "ok" : "short",
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
  const short = rows.filter((row) => reaches(row) === false);
  if (!short.length) return "Nothing falls short.";
  const reached = (row: Row) =>
    isAbsolute(row) ? quantity(row.figure, row.unit) : `${digits(row.ratio ?? Number.NaN)} of the floor`;
  const line = (row: Row) => `  ${row.operation}: ${reached(row)}, goal ${goalText(row)}`;
  return [`${short.length} of ${rows.filter(({ goal }) => goal).length} goals missed:`, ...short.map(line)].join("\n");
}
