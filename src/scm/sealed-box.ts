// Loaded at the first use: few installations seal anything, and it takes a moment.
const library = async () => {
  const { default: sodium } = await import("libsodium-wrappers");
  await sodium.ready;
  return sodium;
};

/** Length of an X25519 key in bytes. */
export const BOX_KEY_BYTES = 32;

/** Encrypts for whoever holds the private key to this X25519 key; nobody else can open it, the sender included. */
export async function sealTo(publicKey: Uint8Array, plain: Uint8Array): Promise<Uint8Array> {
  return (await library()).crypto_box_seal(plain, publicKey);
}

/** A new X25519 key pair. */
export async function newBoxKeys(): Promise<{ publicKey: Uint8Array; privateKey: Uint8Array }> {
  return (await library()).crypto_box_keypair();
}

/** Opens a sealed box; throws if it was made for another key or altered. */
export async function openBox(
  sealed: Uint8Array,
  keys: { publicKey: Uint8Array; privateKey: Uint8Array },
): Promise<Uint8Array> {
  return (await library()).crypto_box_seal_open(sealed, keys.publicKey, keys.privateKey);
}
