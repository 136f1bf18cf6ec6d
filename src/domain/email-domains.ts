// Domains at which anybody can get an address: they say nothing about who somebody works for.
const PUBLIC = `
  126.com 139.com 163.com 189.cn abv.bg alice.it aliyun.com aol.com aol.de arcor.de att.net bbox.fr bellsouth.net
  bigpond.com bk.ru bluewin.ch bol.com.br btinternet.com centrum.cz charter.net comcast.net cox.net daum.net duck.com
  earthlink.net email.com email.cz email.it eclipso.de fastmail.com fastmail.fm foxmail.com free.fr freemail.hu freenet.de
  gmail.com gmx.at gmx.ch gmx.com gmx.de gmx.fr gmx.net googlemail.com hanmail.net hey.com hotmail.be hotmail.ca hotmail.co.jp
  hotmail.co.uk hotmail.com hotmail.com.ar hotmail.com.br hotmail.de hotmail.es hotmail.fr hotmail.it hotmail.nl hotmail.se
  hushmail.com icloud.com ig.com.br inbox.com inbox.lv inbox.ru interia.pl iol.pt juno.com kakao.com kolabnow.com laposte.net
  libero.it list.ru live.at live.be live.ca live.cn live.co.uk live.com live.com.au live.com.mx live.de live.dk live.fr live.ie
  live.it live.jp live.nl live.no live.se lycos.com mac.com mail.bg mail.com mail.de mail.ee mail.ru mailbox.org mailfence.com
  me.com msn.com nate.com naver.com neuf.fr o2.pl onet.eu onet.pl op.pl optonline.net optusnet.com.au orange.fr outlook.at
  outlook.be outlook.co.id outlook.co.nz outlook.co.th outlook.com outlook.com.ar outlook.com.au outlook.com.br outlook.com.tr
  outlook.cz outlook.de outlook.dk outlook.es outlook.fr outlook.hu outlook.ie outlook.in outlook.it outlook.jp outlook.kr
  outlook.lv outlook.my outlook.ph outlook.pt outlook.sa outlook.sg outlook.sk passport.com pm.me pobox.com poczta.onet.pl
  posteo.de posteo.net proton.me protonmail.ch protonmail.com protonmail.de qq.com rambler.ru rediffmail.com rocketmail.com
  rogers.com runbox.com sapo.pt sbcglobal.net seznam.cz sfr.fr shaw.ca sina.cn sina.com sky.com skynet.be sohu.com sympatico.ca
  t-online.de talktalk.net telenet.be telus.net terra.com.br tin.it tiscali.it tuta.com tuta.io tutanota.com tutanota.de
  ukr.net uol.com.br verizon.net videotron.ca virgilio.it virginmedia.com vodafone.de wanadoo.fr web.de windowslive.com wp.pl
  xtra.co.nz ya.ru yahoo.ca yahoo.co.id yahoo.co.in yahoo.co.jp yahoo.co.kr yahoo.co.nz yahoo.co.uk yahoo.com yahoo.com.ar
  yahoo.com.au yahoo.com.br yahoo.com.hk yahoo.com.mx yahoo.com.ph yahoo.com.sg yahoo.com.tr yahoo.com.tw yahoo.com.vn yahoo.de
  yahoo.dk yahoo.es yahoo.fr yahoo.gr yahoo.ie yahoo.in yahoo.it yahoo.no yahoo.pl yahoo.ro yahoo.se yandex.by yandex.com
  yandex.kz yandex.ru yandex.ua ymail.com zoho.com zoho.eu zohomail.com
`;
const DOMAINS: ReadonlySet<string> = new Set(PUBLIC.trim().split(/\s+/));

/** Domain of a mail address, in lower case; empty if it has none. */
export const emailDomain = (address: string): string => /@([^@]+)$/.exec(address)?.[1]?.toLowerCase() ?? "";

/** Whether anybody can get an address at this domain: by the list that ships, or by what the operator adds to it. */
export const isPublicEmailDomain = (domain: string, added: readonly string[]): boolean =>
  DOMAINS.has(domain.toLowerCase()) || added.includes(domain.toLowerCase());
