// The small shell around a command that outlives the supervisor: it leads the session, keeps the pipe of the command's
// output open and writes its exit code down, so that whoever comes after a dead supervisor finds out and reads on.

// Arguments: the folder, a file in it, a number of tenths of a second, then the command. The signals reach the command as
// well; the shell has to survive them. Once the code is written it stays until the file is there, or for that long, so
// that what is still in the pipe is not lost with the last who holds it open.
// A subshell runs the command, because some shells write which signal ended it to where its output goes.
const SHIM = `dir=$1; until=$2; left=$3; shift 3
trap : TERM INT HUP QUIT USR1 USR2 PIPE
exec 3<>"$dir/pipe" || exit 1
(exec "$@" </dev/null >"$dir/pipe" 2>&1 3<&-)
code=$?
printf '%s\\n' "$code" >"$dir/exit.new" && mv -f "$dir/exit.new" "$dir/exit"
while [ -d "$dir" ] && [ ! -e "$dir/$until" ] && [ "$left" -gt 0 ]; do sleep 0.1; left=$((left-1)); done`;

// Argument: the folder. In a container nothing secret may be among the arguments or in the variables it is started with,
// for the engine keeps both: the script that sets the variables and becomes the command comes through a pipe. Until then
// nothing has happened, and if whoever gives it dies meanwhile, nothing does.
const GIVEN = `berth_shell=$(command -v sh)
berth_folder=$1
berth_given=$(cat "$1/given") || exit 125
unset BERTH_ENVIRONMENT_ID
eval "$berth_given"
exit 125`;

/** Exists once the output has been read to its end. */
export const DRAINED_FILE = "drained";
/** Exists once a command in a container has begun. */
export const BEGUN_FILE = "begun";
/** The pipe that a command in a container comes through. */
export const GIVEN_PIPE = "given";
export const OUTPUT_PIPE = "pipe";

const LINGER_TENTHS = 300;
/** Longer than the stop command of a service may take, which ends with the container. */
const CONTAINER_LINGER_TENTHS = 1800;

/** Arguments for `sh` that run a command on the host. */
export const hostShim = (folder: string, argv: readonly string[]): string[] => [
  ...["-c", SHIM, "berth-shim", folder, DRAINED_FILE, String(LINGER_TENTHS), ...argv],
];

/**
 * Arguments for `sh` that run what comes through the pipe in the folder. As the first process of a container it stays
 * until the container is removed, since everything in it ends with this process.
 */
export function containerShim(folder: string, isFirst: boolean): string[] {
  const [until, tenths] = isFirst ? ["removed", CONTAINER_LINGER_TENTHS] : [DRAINED_FILE, LINGER_TENTHS];
  return ["-c", SHIM, "berth-shim", folder, until, String(tenths), "sh", "-c", GIVEN, "berth-command", folder];
}

const quoted = (text: string) => `'${text.replaceAll("'", "'\\''")}'`;

/** What goes through the pipe: sets the variables, then becomes the command. */
export const givenScript = (variables: Readonly<Record<string, string>>, command: string): string =>
  [
    ...Object.entries(variables).map(([name, value]) => `export ${name}=${quoted(value)}`),
    `: >"$berth_folder/${BEGUN_FILE}"`,
    `exec "$berth_shell" -c ${quoted(command)}`,
    "",
  ].join("\n");
