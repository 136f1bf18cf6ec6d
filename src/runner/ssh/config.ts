import type { EnvironmentSpec_SSHPublicKey } from "../../../gen/gitpod/v1/environment_pb.js";
import { shellQuoted } from "../supervisor/shell.ts";

// What the SSH server of an environment is told. Pure.

/** Variable that the processes of SSH sessions are known by. */
export const SESSION_MARK = "BERTH_SSH_SESSION";

export interface ServerSettings {
  address: string;
  port: number;
  userName: string;
  hostKey: string;
  authorizedKeys: string;
  /** Program of each session. */
  sessionScript: string;
  sftpServer: string | undefined;
  /** The home is that of a container, so that no shell of the host may read what is in it before the session begins. */
  isContained: boolean;
}

// The server knows `%` tokens in paths, and takes a path with blanks in quotes.
const pathOf = (path: string) => `"${path.replaceAll("%", "%%")}"`;

// Bash takes its first level for a login by SSH.
const NO_STARTUP_FILES = "SetEnv SHLVL=1\n";

/**
 * The server runs as the environment's user, so that it can let nobody else in. It does not look at the folders above
 * its files: those are the runner's.
 */
export const serverConfig = (settings: ServerSettings): string => `Port ${settings.port}
ListenAddress ${settings.address}
HostKey "${settings.hostKey}"
AuthorizedKeysFile ${pathOf(settings.authorizedKeys)}
PidFile none
StrictModes no
UsePAM no
AllowUsers ${settings.userName}
PermitRootLogin no
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitUserEnvironment no
PermitUserRC no
PermitTunnel no
GatewayPorts no
X11Forwarding no
PrintMotd no
PrintLastLog no
LoginGraceTime 30
MaxStartups 10:30:60
MaxSessions 50
ClientAliveInterval 30
ClientAliveCountMax 4
AcceptEnv LANG LC_* COLORTERM
${settings.isContained ? NO_STARTUP_FILES : ""}LogLevel ERROR
${settings.sftpServer ? `Subsystem sftp ${settings.sftpServer}\n` : ""}ForceCommand /bin/sh ${shellQuoted(settings.sessionScript)}
`;

/**
 * Program of a session: what every process of the environment gets, then the command or a shell. That is no login shell,
 * whose profile would replace PATH. A notice is shown first.
 */
export const sessionScript = (variables: string, notice = ""): string => `variables=${shellQuoted(variables)}
if [ -r "$variables" ]; then . "$variables"; fi
unset variables
export ${SESSION_MARK}=1
cd -- "$HOME" 2>/dev/null || cd /
${notice ? `unset SHLVL\necho ${shellQuoted(notice)} >&2\n` : ""}if [ -z "\${SSH_ORIGINAL_COMMAND+x}" ]; then exec "$SHELL"; fi
set -- "$SSH_ORIGINAL_COMMAND"
unset SSH_ORIGINAL_COMMAND
exec "$SHELL" -c "$1"
`;

/** What a session in a container needs. */
export interface ContainedSession {
  environmentId: string;
  variables: string;
  /** Program that gets people into the container; not there while there is none. */
  login: string;
  /** Runs on the host, whose paths are the same. */
  sftpServer: string | undefined;
}

const NO_CONTAINER = "the dev container is not up yet";

/**
 * Program of a session that belongs into a container. The one that gets people in is a program of the runner: what they
 * have set for theirs is not for it.
 */
export const containedSessionScript = ({ environmentId, variables, login, sftpServer }: ContainedSession): string => `${
  sftpServer ? `if [ "$SSH_ORIGINAL_COMMAND" = ${shellQuoted(sftpServer)} ]; then\n${sessionScript(variables)}fi\n` : ""
}unset NODE_OPTIONS NODE_PATH NODE_EXTRA_CA_CERTS LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT
export ${SESSION_MARK}=1 BERTH_ENVIRONMENT_ID=${shellQuoted(environmentId)}
login=${shellQuoted(login)}
if [ ! -x "$login" ]; then
  echo ${shellQuoted(NO_CONTAINER)} >&2
  exit 255
fi
exec "$login"
`;

// Shells set these themselves, and end when somebody else tries to.
const READ_ONLY = new Set(["UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO"]);

/** Variables in a form that a shell reads; names that it could not have are left out. */
export function shellVariables(variables: Readonly<Record<string, string>>): string {
  const usable = Object.entries(variables).filter(
    ([name, text]) => /^[A-Za-z_][A-Za-z0-9_]*$/.test(name) && !READ_ONLY.has(name) && !text.includes("\0"),
  );
  return usable.map(([name, text]) => `export ${name}=${shellQuoted(text)}\n`).join("");
}

/** The keys that may log in, one a line; a text that is not one line cannot be one. */
export const authorizedKeys = (keys: readonly EnvironmentSpec_SSHPublicKey[]): string =>
  keys
    .map(({ value }) => value.trim())
    .filter((value) => value !== "" && !/[\r\n\0]/.test(value))
    .map((value) => `${value}\n`)
    .join("");
