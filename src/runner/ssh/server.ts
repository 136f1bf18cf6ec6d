import { constants } from "node:fs";
import { access, realpath } from "node:fs/promises";
import { dirname, join } from "node:path";

/** An OpenSSH server of this machine; paths are absolute. */
export interface SshServer {
  sshd: string;
  keygen: string;
  /** Absent where files cannot be transferred. */
  sftpServer: string | undefined;
}

const FOLDERS = ["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin", "/sbin"];
const SFTP_SERVERS = [
  "/usr/lib/openssh/sftp-server",
  "/usr/libexec/openssh/sftp-server",
  "/usr/lib/ssh/sftp-server",
  "/usr/libexec/sftp-server",
];

async function firstProgram(paths: readonly string[]): Promise<string | undefined> {
  for (const path of paths) {
    const isUsable = await access(path, constants.X_OK).then(
      () => true,
      () => false,
    );
    if (isUsable) return path;
  }
  return undefined;
}

/** The SSH server that `PATH` leads to, or one in the usual places; undefined if there is none. */
export async function findSshServer(path: string): Promise<SshServer | undefined> {
  const folders = [...path.split(":").filter((folder) => folder.startsWith("/")), ...FOLDERS];
  const programs = (name: string) => folders.map((folder) => join(folder, name));
  const sshd = await firstProgram(programs("sshd"));
  const keygen = await firstProgram(programs("ssh-keygen"));
  if (!sshd || !keygen) return undefined;
  const beside = join(dirname(dirname(await realpath(sshd))), "lib/openssh/sftp-server");
  return { sshd, keygen, sftpServer: await firstProgram([beside, ...SFTP_SERVERS]) };
}

/** Everything of it that is run. */
export const programsOf = (server: SshServer | undefined): string[] =>
  server ? [server.sshd, server.keygen, ...(server.sftpServer ? [server.sftpServer] : [])] : [];
