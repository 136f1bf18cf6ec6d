const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

/** Whether a text can be the id of anything; checked where the contract leaves it open. */
export const isUuid = (text: string) => UUID.test(text);
